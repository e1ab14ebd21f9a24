"""What leaving blocks out saves on the clock: grouped and masked execution over the network without gates.

    python benchmarks/skipping.py

Every image keeps each block with the same probability, drawn anew for each turn. grouped runs a block on the images
that keep it; masked, as the papers' code, runs it on all and multiplies. All sides have batch norm folded into the
convolutions and channels-last memory, and take turns in one process; trimmed means over the draws count. Printed beside
them is the share of multiply-accumulates kept, which no execution can beat by much.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor

from pliant.networks.execution import Execution, folded, runner
from pliant.networks.resnet import ResidualNet, ResNet, cost

CASES = {
    "resnet56": (ResNet(depth=56), 32, (64, 1)),
    "resnet50": (ResNet(form="imagenet", depth=50), 224, (16, 1)),
}
KEEP = (25, 50, 75)


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    draws: int = 12
    """Draws of gates for each case, after one to warm up; four times as many for single images."""
    threads: int = 2


def forward(net: ResidualNet, images: Tensor, gates: Tensor, execution: Execution) -> Callable[[], Tensor]:
    """A forward that carries these gates, (B, N), out."""
    run = runner(execution, "inside")
    return lambda: net(images, lambda number, x: gates[:, number], run)


def seconds(action: Callable[[], Tensor]) -> float:
    """Of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def trimmed(values: list[float]) -> float:
    """The mean without the fastest and slowest eighth, which a shared machine makes."""
    cut = len(values) // 8
    return statistics.mean(sorted(values)[cut : len(values) - cut])


def measure(net: ResidualNet, images: Tensor, keep: float, draws: int) -> dict[str, float]:
    """Ratios over the network without gates, and the share of multiply-accumulates kept."""
    generator = torch.Generator().manual_seed(0)
    draws *= 4 if len(images) == 1 else 1  # one image's draw says little
    taken: dict[str, list[float]] = {"whole": [], "grouped": [], "masked": []}
    kept = []
    whole = cost(net, images.shape[-1])
    residual = torch.tensor(whole.residual, dtype=torch.float64)
    for draw in range(draws + 1):
        gates = (torch.rand(len(images), net.spec.number_of_blocks, generator=generator) < keep).float()
        sides: dict[str, Callable[[], Tensor]] = {
            "whole": lambda: net(images),
            "grouped": forward(net, images, gates, "grouped"),
            "masked": forward(net, images, gates, "masked"),
        }
        for name in list(sides) if draw % 2 else list(reversed(sides)):
            spent = seconds(sides[name])
            if draw:
                taken[name].append(spent)
        if draw:
            kept.append(((gates.double() @ residual).mean().item() + whole.always) / whole.total)
    alone = trimmed(taken["whole"])
    return {
        "grouped": round(trimmed(taken["grouped"]) / alone, 4),
        "masked": round(trimmed(taken["masked"]) / alone, 4),
        "macs": round(statistics.mean(kept), 4),
    }


@torch.inference_mode()
def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for name, (spec, side, batches) in CASES.items():
        torch.manual_seed(0)
        net = folded(spec.build(10)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for batch in batches:
            images = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
            for keep in KEEP:
                measured = measure(net, images, keep / 100, settings.draws)
                results.setdefault(name, {}).setdefault(f"batch{batch}", {})[f"keep{keep}"] = measured
                print(
                    f"{name} batch {batch}, {keep} % kept ({measured['macs']:.2f} of the MACs): grouped "
                    f"{measured['grouped']:.2f}, masked {measured['masked']:.2f} of the time without gates",
                    flush=True,
                )
    print(json.dumps(results))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
