"""Individually trained networks, the baseline of the papers on width: one network at one fixed width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.functional import cross_entropy

from pliant.methods.widths import WidthRecipe
from pliant.networks.mobilenet import SlimmableNet
from pliant.randomness import Draw
from pliant.recipe import Batch, Pass, Point, Progress, Width


@dataclass(frozen=True, kw_only=True)
class INet(WidthRecipe):
    """Ordinary training. Wider channels than `width` are not allocated."""

    width: float = 1.0
    """The one width."""

    def build(self, classes: int) -> SlimmableNet:
        return self.network.build(classes, tracked=(self.width,), widest=self.width)

    def passes(self, progress: Progress) -> int:
        return 1

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        logits = net(batch.images, self.width)
        yield Pass(str(Width(self.width)), cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing))

    def points(self) -> tuple[Point, ...]:
        return (Width(self.width),)

    def calibrates(self, point: Point) -> bool:
        """It has the statistics that it trained with, as any network."""
        return False

    def graphs(self) -> int | str:
        return 1
