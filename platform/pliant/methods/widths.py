"""What the methods on width have in common: a slimmable network asked for a `Width` or `Widths`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from pliant.errors import UserError
from pliant.networks.mobilenet import MobileNet, SlimmableNet, WidthLike
from pliant.networks.ordinary import ordinary
from pliant.recipe import Outcome, Point, Recipe, Width, Widths


def width_of(point: Point) -> WidthLike:
    """The network's argument for a point of width.

    Raises:
        UserError: it is another kind of point.
    """
    if isinstance(point, Width):
        return point.ratio
    if isinstance(point, Widths):
        return point.ratios
    raise UserError(f"{point} is not a width: write for instance 0.35.")


def grid(low: float, high: float, step: float) -> tuple[float, ...]:
    """Widths from `low` to `high`, both included, `step` apart; the last may be nearer."""
    count = math.ceil((high - low) / step - 1e-6)
    between = (round(low + number * step, 6) for number in range(1, count))
    return (low, *between, high) if count else (high,)


@dataclass(frozen=True, kw_only=True)
class WidthRecipe(Recipe):
    """A method whose points are widths of a slimmable MobileNet."""

    network: MobileNet = field(default_factory=MobileNet)
    label_smoothing: float = 0.0
    """Share of the label that is spread over all classes."""

    def __post_init__(self) -> None:
        for point in self.points():
            width_of(point)
        if not 0.0 <= self.label_smoothing < 1.0:
            raise UserError(
                f"Label smoothing lies in [0, 1): write --recipe.label-smoothing so, not {self.label_smoothing:g}."
            )
        try:  # the channel counts are arithmetic: refuse a divisor before a weight is allocated
            self.network.check()
        except ValueError as error:
            raise UserError(f"--recipe.network: {error}") from None

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        return Outcome(logits=net(images, width_of(point)))

    def admits_mixing(self) -> str | None:
        return None

    def parameters_at(self, net: nn.Module, point: Point) -> int:
        cut = cast(SlimmableNet, net).skeleton(width_of(point))
        return sum(parameter.numel() for parameter in cut.parameters())

    def export(self, net: nn.Module, point: Point) -> nn.Module:
        """The ordinary network at `point`, without any slimmable layer; `net` holds its statistics."""
        return ordinary(cast(SlimmableNet, net), width_of(point))


def admitted(point: Point, low: float, high: float, groups: int | None = None) -> str | None:
    """None if every width of the point lies in [low, high], else the sentence that refuses it."""
    if not isinstance(point, (Width, Widths)):
        return f"{point} is not a width: write for instance {high:g}."
    ratios = (point.ratio,) if isinstance(point, Width) else point.ratios
    if groups is not None and isinstance(point, Widths) and len(ratios) != groups:
        return f"This network has {groups} groups of layers, not {len(ratios)}: write one width for each."
    outside = [ratio for ratio in ratios if not low - 1e-9 <= ratio <= high + 1e-9]
    if outside:
        return f"Width {outside[0]:g} lies outside the trained range: write a width from {low:g} to {high:g}."
    return None
