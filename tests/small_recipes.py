"""Recipes that are no slimmable networks, small enough to be compared with a bare loop.

Each takes the contract somewhere a method of the papers will: parts that are frozen, several networks, roll-outs
without gradient, parameters used per sample, passes whose number changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.randomness import Draw
from pliant.recipe import Batch, Native, Outcome, Pass, Point, Progress, Recipe, Stage


def unmixed(images: Tensor, labels: Tensor) -> Batch:
    """A micro-batch whose losses learn from its labels."""
    return SimpleNamespace(images=images, labels=labels, targets=labels)


class Pair(nn.Module):
    """A backbone with batch norm and dropout, and a head."""

    def __init__(self, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Linear(6, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images).mean((2, 3)))


@dataclass(frozen=True, kw_only=True)
class Plain(Recipe):
    """Ordinary training: one pass."""

    dropout: float = 0.0

    def build(self, classes: int) -> nn.Module:
        return Pair(classes, self.dropout)

    def passes(self, progress: Progress) -> int:
        return 1

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        yield Pass("plain", cross_entropy(net(batch.images), batch.labels))

    def points(self) -> tuple[Point, ...]:
        return (Native(),)

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        return Outcome(net(images))

    def graphs(self) -> int | str:
        return 1


@dataclass(frozen=True, kw_only=True)
class TwoStages(Plain):
    """The head alone, over a frozen backbone; then everything."""

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(name="head", learns=("head",), share=0.5),
            Stage(name="joint", share=0.5, learning_rate=0.1),
        )


@dataclass(frozen=True, kw_only=True)
class RollOuts(Plain):
    """A policy that weighs a backbone's two halves, rewarded by two roll-outs without gradient."""

    def build(self, classes: int) -> nn.Module:
        return nn.ModuleDict({"net": Pair(classes), "policy": nn.Linear(3, 2)})

    def passes(self, progress: Progress) -> int:
        return 2

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        assert isinstance(net, nn.ModuleDict)
        odds = net["policy"](batch.images.mean((2, 3))).softmax(1)
        actions = torch.multinomial(odds.detach(), 1, generator=draw.generator(batch.images.device))
        with torch.no_grad():
            rewards = [
                -cross_entropy(net["net"](batch.images * (1 + k)), batch.labels, reduction="none") for k in (0, 1)
            ]
        advantage = rewards[1] - rewards[0]
        log_odds = odds.gather(1, actions).log()[:, 0]
        yield Pass("policy", -(log_odds * advantage).mean(), {"advantage": advantage.mean()})
        yield Pass("net", cross_entropy(net["net"](batch.images * (1 + actions[:, :, None, None])), batch.labels))


@dataclass(frozen=True, kw_only=True)
class PerSample(Plain):
    """Each image chooses one of three heads, so a pass, or a rank, may leave a head out; one is never chosen."""

    def build(self, classes: int) -> nn.Module:
        return nn.ModuleDict(
            {"backbone": Pair(classes).backbone, "heads": nn.ModuleList(nn.Linear(6, classes) for _ in range(4))}
        )

    def passes(self, progress: Progress) -> int:
        return 2

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        assert isinstance(net, nn.ModuleDict)
        features = net["backbone"](batch.images).mean((2, 3))
        yield Pass("chosen", self.loss(net, features, batch.labels, batch.labels % 3))
        features = net["backbone"](batch.images).mean((2, 3))
        yield Pass("first", self.loss(net, features, batch.labels, torch.zeros_like(batch.labels)))

    @staticmethod
    def loss(net: nn.ModuleDict, features: Tensor, labels: Tensor, chosen: Tensor) -> Tensor:
        total = features.new_zeros(())
        for number, head in enumerate(net["heads"]):
            own = chosen == number
            if own.any():
                total = total + cross_entropy(head(features[own]), labels[own], reduction="sum")
        return total / len(labels)


@dataclass(frozen=True, kw_only=True)
class Unequal(Plain):
    """One to four passes by the step's number; the head takes part in the first alone, the backbone in all."""

    def passes(self, progress: Progress) -> int:
        return 1 + progress.step % 4

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        assert isinstance(net, Pair)
        yield Pass("whole", cross_entropy(net(batch.images), batch.labels))
        for number in range(progress.step % 4):
            yield Pass(f"part{number}", net.backbone(batch.images * (number + 2)).square().mean())


ALL = (Plain(), TwoStages(), RollOuts(), PerSample(), Unequal())
