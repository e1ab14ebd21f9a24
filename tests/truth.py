"""A recipe for the truth table: what its passes touch differs by pass and by rank, and a bare loop to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.randomness import Draw
from pliant.recipe import Batch, Native, Outcome, Pass, Point, Progress, Recipe
from tests.small_recipes import unmixed


class Forked(nn.Module):
    """A trunk, and heads by who uses them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.every = nn.Linear(6, classes)
        self.earlier = nn.Linear(6, classes)
        self.lone = nn.Linear(6, classes)
        self.dead = nn.Linear(6, classes)

    def forward(self, images: Tensor, heads: tuple[str, ...]) -> Tensor:
        features = self.trunk(images).mean((2, 3))
        return sum((getattr(self, head)(features) for head in heads), torch.zeros(()))


@dataclass(frozen=True, kw_only=True)
class Touches(Recipe):
    """One to four passes, by the step's number. `every` takes part in all of them, `earlier` in all but the last (in
    the only one, if there is one), `lone` on the rank that runs the first micro-batch alone, `dead` nowhere."""

    alike: bool = False
    """All ranks run the same layers: without `lone`."""

    def build(self, classes: int) -> nn.Module:
        return Forked(classes)

    def passes(self, progress: Progress) -> int:
        return 1 + progress.step % 4

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        number = self.passes(progress)
        for index in range(number):
            heads = ["every"]
            if index < number - 1 or number == 1:
                heads.append("earlier")
            if draw.micro_batch == 0 and index == 0 and not self.alike:
                heads.append("lone")
            yield Pass(f"pass{index}", cross_entropy(net(batch.images * (1 + index), tuple(heads)), batch.labels))

    def points(self) -> tuple[Point, ...]:
        return (Native(),)

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        return Outcome(net(images, ("every",)))


def batch_of(step: int, index: int, images: int = 8) -> Batch:
    """The micro-batch with this index in the step."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    return unmixed(pixels, torch.randint(5, (images,), generator=generator))


def progress_at(step: int) -> Progress:
    """A step of one long stage."""
    return Progress(stage=0, step=step, steps=100, epoch=0, run_share=0.0)


def bare_gradients(recipe: Recipe, net: nn.Module, step: int, total: int, bf16: bool) -> dict[str, Tensor]:
    """One process, all micro-batches in turn, nothing of the engine; zero where no pass came by."""
    net.zero_grad()
    for index in range(total):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            passes = iter(recipe.iteration(net, batch_of(step, index), Draw(0, 0, step, index), progress_at(step)))
        while True:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                one = next(passes, None)
            if one is None:
                break
            # Divided afterwards: by 3 beforehand, bf16 would round the whole backward otherwise than the engine's.
            one.loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / total
        for name, parameter in net.named_parameters()
    }
