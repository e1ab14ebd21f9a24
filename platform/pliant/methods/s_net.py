"""Slimmable networks (Yu et al., ICLR 2019, arXiv 1812.08928): one network at a few fixed widths.

Switchable batch norm: each width keeps its own statistics, and has its own scale and shift if `private`. All widths
train in each iteration on the labels, largest first; gradients are summed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.methods.widths import WidthRecipe, admitted
from pliant.networks.mobilenet import SlimmableNet
from pliant.randomness import Draw
from pliant.recipe import Batch, Pass, Point, Progress, Width


@dataclass(frozen=True, kw_only=True)
class SNet(WidthRecipe):
    """A network with a switch for each width."""

    widths: tuple[float, ...] = (1.0, 0.75, 0.5, 0.35)
    """The switches, largest first."""
    private: bool = False
    """Scale and shift of batch norm private to each width (US-Nets section 6); statistics always are."""

    def __post_init__(self) -> None:
        if not self.widths or list(self.widths) != sorted(set(self.widths), reverse=True):
            raise UserError(
                f"The widths of an S-Net go from the largest to the smallest, each once: got {self.widths}; write for "
                "instance --recipe.widths 1.0 0.75 0.5 0.35."
            )
        super().__post_init__()

    def build(self, classes: int) -> SlimmableNet:
        return self.network.build(classes, tracked=self.widths, widest=self.widths[0], private=self.private)

    def passes(self, progress: Progress) -> int:
        return len(self.widths)

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        answers = cast(SlimmableNet, net).at_each(batch.images, self.widths)
        for width, logits in zip(self.widths, answers, strict=True):
            yield Pass(str(Width(width)), cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing))

    def points(self) -> tuple[Point, ...]:
        return tuple(Width(width) for width in self.widths)

    def admits(self, point: Point) -> str | None:
        if self.private or point in self.points():
            return super().admits(point)
        return admitted(point, self.widths[-1], self.widths[0], self.network.number_of_groups)

    def calibrates(self, point: Point) -> bool:
        """A switch has the statistics that it trained with."""
        return point not in self.points()

    def graphs(self) -> int | str:
        return len(self.widths)
