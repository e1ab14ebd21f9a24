"""One sandwich step against four ordinary networks: what slimming costs, or saves.

    python benchmarks/sandwich_step.py

US-MobileNetV2 forward and backward at widths 1.0, .35, .6 and .8 in one step, against the sum of four torchvision
MobileNetV2 built at those widths; batch 16, 224 px, fp32, two threads, channels last, no optimizer step on either
side. The two sides alternate in one process; the ratio is the median of the rounds' ratios. The stem and the first
depthwise convolution, which all widths share exactly, run once in the sandwich step and four times in the others.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

from pliant.methods.us_net import USNet
from pliant.randomness import Draw
from pliant.recipe import Progress
from pliant.torchvision_cpu import make_importable

make_importable()
from torchvision.models import mobilenet_v2

WIDTHS = (1.0, 0.35, 0.6, 0.8)


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    rounds: int = 15
    """Pairs of steps, after two to warm up."""
    batch: int = 16
    size: int = 224
    threads: int = 2


@dataclass(frozen=True)
class FixedDraw:
    """Gives the widths of the comparison in place of random ones."""

    def uniform(self, low: float, high: float, number: int) -> tuple[float, ...]:
        return WIDTHS[2 : 2 + number]


@dataclass(frozen=True)
class Images:
    images: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor


def sandwich(batch: Images) -> Callable[[], None]:
    """The recipe's own iteration, each pass's backward run as the engine does."""
    recipe = USNet(low=0.35, n=4)
    net = recipe.build(1000).to(memory_format=torch.channels_last).train()
    progress = Progress(stage=0, step=0, steps=1, epoch=0, run_share=0.0)
    draw: Draw = FixedDraw()  # type: ignore[assignment]

    def step() -> None:
        for one in recipe.iteration(net, batch, draw, progress):
            one.loss.backward()
        net.zero_grad()

    return step


def separate(batch: Images) -> Callable[[], None]:
    """Four networks of torchvision, each on its own."""
    nets: list[nn.Module] = [
        mobilenet_v2(width_mult=width).to(memory_format=torch.channels_last).train() for width in WIDTHS
    ]

    def step() -> None:
        for net in nets:
            cross_entropy(net(batch.images), batch.labels).backward()
            net.zero_grad()

    return step


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """Elapsed and CPU seconds of one step."""
    elapsed, used = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - elapsed, time.process_time() - used


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    images = torch.randn(settings.batch, 3, settings.size, settings.size).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (settings.batch,))
    batch = Images(images, labels, labels)
    ours, plain = sandwich(batch), separate(batch)
    for step in (ours, plain) * 2:
        step()
    pairs = []
    for number in range(settings.rounds):
        first, second = (ours, plain) if number % 2 else (plain, ours)
        one, other = seconds(first), seconds(second)
        pairs.append((one, other) if number % 2 else (other, one))
    elapsed = statistics.median(mine[0] / theirs[0] for mine, theirs in pairs)
    used = statistics.median(mine[1] / theirs[1] for mine, theirs in pairs)
    least = min(mine[0] for mine, _ in pairs) / min(theirs[0] for _, theirs in pairs)
    print(f"sandwich step   {min(mine[0] for mine, _ in pairs):.3f} s at best")
    print(f"four networks   {min(theirs[0] for _, theirs in pairs):.3f} s at best")
    print(f"ratio           {elapsed:.3f} elapsed, {used:.3f} CPU time (medians of {settings.rounds} pairs)")
    result = {
        "benchmark": "sandwich_step",
        "ratio_vs_plain": round(elapsed, 4),
        "ratio_cpu_time": round(used, 4),
        "ratio_of_least": round(least, 4),
        "rounds": settings.rounds,
        "batch": settings.batch,
        "threads": settings.threads,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
