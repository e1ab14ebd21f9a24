"""Universally slimmable networks (Yu and Huang, ICCV 2019, arXiv 1903.05134): one network at any width in a range.

Gradients of the passes are summed, not averaged, as in the authors' code, so that learning rates mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.methods.distillation import mixed_cross_entropy, soft_labels
from pliant.methods.widths import WidthRecipe, admitted, grid, width_of
from pliant.networks.mobilenet import SlimmableNet, WidthLike
from pliant.randomness import Draw
from pliant.recipe import Batch, Pass, Point, Progress, Width, Widths

Rule = Literal["sandwich", "min", "max", "random"]


@dataclass(frozen=True, kw_only=True)
class USNet(WidthRecipe):
    """Algorithm 1: the full network on the labels, then the smallest and n - 2 random ones on its answer."""

    low: float = 0.35
    """Smallest width, the paper's lower bound k0."""
    high: float = 1.0
    """Largest width."""
    n: int = 4
    """Passes per iteration (Fig. 9: 4 is better than 3, 5 like 4)."""
    rule: Rule = "sandwich"
    """Which widths, Table 2. sandwich: smallest, largest, n - 2 random. min: smallest, n - 1 random. max: largest,
    n - 1 random; with n = 1 the largest alone, which is plain training. random: n random."""
    distill: bool = True
    """In-place distillation (section 4.2); needs the largest width in each iteration."""
    hard: float = 0.0
    """Share of the labels' own loss in the distilled passes, in [0, 1]; the paper found 0 best (section 4.2)."""
    hard_decay: bool = False
    """Let that share fall linearly to 0 over the stage."""
    nonuniform: bool = False
    """Random passes draw a width for each group of layers (section 6), each micro-batch its own; the smallest and
    largest passes stay uniform."""
    grid: float = 0.05
    """Distance of the widths that a spectrum shows."""
    statistics: Literal["measured", "accumulated"] = "measured"
    """Those of batch norm in a trained network. measured: after training, for any width. accumulated, an ablation
    (section 3.2: much worse): each width of the grid has its own and moves them when it is drawn; no others are
    drawn."""

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= self.high <= 1.0:
            raise UserError(
                f"The widths of a US-Net run from --recipe.low to --recipe.high, with 0 < low <= high <= 1: got "
                f"{self.low:g} and {self.high:g}."
            )
        least = 2 if self.rule == "sandwich" else 1
        if self.n < least:
            raise UserError(f"The rule {self.rule} needs --recipe.n of {least} or more, not {self.n}.")
        if self.distill and self.rule not in ("sandwich", "max"):
            raise UserError(
                f"The rule {self.rule} does not run the largest width in each iteration, which in-place distillation "
                "learns from: write --recipe.no-distill, or --recipe.rule sandwich."
            )
        if not 0.0 <= self.hard <= 1.0:
            raise UserError(f"A share of the loss lies in [0, 1]: write --recipe.hard so, not {self.hard:g}.")
        if self.hard and not self.distill:
            raise UserError(
                "Without in-place distillation every pass has the labels' own loss: leave --recipe.hard out, or "
                "--recipe.no-distill."
            )
        if self.hard_decay and not self.hard:
            raise UserError("Nothing decays from 0: write --recipe.hard as well, or leave --recipe.hard-decay out.")
        if not self.grid > 0.0:
            raise UserError(f"Widths cannot be {self.grid:g} apart: write a --recipe.grid above 0.")
        if self.statistics == "accumulated" and self.nonuniform:
            raise UserError(
                "Nonuniform widths are too many to accumulate statistics for: leave --recipe.nonuniform or "
                "--recipe.statistics accumulated out."
            )
        super().__post_init__()

    def build(self, classes: int) -> SlimmableNet:
        own = self.points() if self.statistics == "accumulated" else self.tracked()
        return self.network.build(classes, tracked=[cast(Width, point).ratio for point in own], widest=self.high)

    def passes(self, progress: Progress) -> int:
        return self.n

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        widths = self.widths(cast(SlimmableNet, net), draw)
        answers = cast(SlimmableNet, net).at_each(batch.images, widths)
        soft: Tensor | None = None
        for number, (width, logits) in enumerate(zip(widths, answers, strict=True)):
            if soft is None:
                loss = cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing)
                soft = soft_labels(logits) if self.distill else None
            else:
                hard = self.hard * (1.0 - progress.stage_share) if self.hard_decay else self.hard
                loss = mixed_cross_entropy(logits, batch.targets, soft, hard=hard, smoothing=self.label_smoothing)
            yield Pass(str(Width(cast(float, width))) if number < len(self._bounds()) else "random", loss)

    def widths(self, net: SlimmableNet, draw: Draw) -> list[WidthLike]:
        """The widths of one iteration, largest first where the rule has it."""
        fixed = self._bounds()
        rest = self.n - len(fixed)
        if not self.nonuniform:
            drawn = draw.uniform(self.low, self.high, rest)
            return [*fixed, *(drawn if self.statistics == "measured" else map(self._on_grid, drawn))]
        ratios = draw.own("nonuniform").uniform(self.low, self.high, (rest, len(net.groups)))
        return [*fixed, *(tuple(row) for row in ratios.tolist())]

    def _bounds(self) -> tuple[float, ...]:
        """The widths that every iteration runs."""
        return {"sandwich": (self.high, self.low), "min": (self.low,), "max": (self.high,), "random": ()}[self.rule]

    def _on_grid(self, width: float) -> float:
        return min(grid(self.low, self.high, self.grid), key=lambda one: abs(one - width))

    def points(self) -> tuple[Point, ...]:
        return tuple(Width(width) for width in grid(self.low, self.high, self.grid))

    def tracked(self) -> tuple[Point, ...]:
        return tuple(Width(width) for width in sorted(set(self._bounds())))

    def calibrates(self, point: Point) -> bool:
        return self.statistics == "measured"

    def admits(self, point: Point) -> str | None:
        if self.statistics == "accumulated":
            return super().admits(point)
        return admitted(point, self.low, self.high, self.network.number_of_groups)

    def narrower(self, net: nn.Module, point: Point, step: float) -> Sequence[Point]:
        """One group of layers by a step, or by as many as it takes to lose channels."""
        if self.statistics == "accumulated":
            return []  # of unlike widths none were accumulated
        slimmable, width = cast(SlimmableNet, net), width_of(point)
        ratios = (width,) * len(slimmable.groups) if isinstance(width, float) else tuple(width)
        found: list[Point] = []
        for group, ratio in enumerate(ratios):
            for steps in range(1, math.ceil((ratio - self.low) / step - 1e-6) + 1):
                lower = max(self.low, round(ratio - steps * step, 6))
                below = (*ratios[:group], lower, *ratios[group + 1 :])
                if slimmable.channels(below) != slimmable.channels(ratios):
                    found.append(Widths(below))
                    break
        return found

    def graphs(self) -> int | str:
        if self.n > len(self.tracked()):
            return (
                "a US-Net draws its widths freely, each a graph of its own, and torch falls back to running "
                "uncompiled without a message once it has met too many"
            )
        return self.n
