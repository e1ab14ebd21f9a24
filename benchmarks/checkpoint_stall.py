"""What saving in the background costs training, against saving while training waits.

    python benchmarks/checkpoint_stall.py

The state is 300 MB: the weights and momentum of a convolutional network. Turns of steps with one save at their start
alternate with turns without, and after each pair one blocking save with the same guarantees (flushed, hashed, renamed)
is timed. `stall_ratio` is the time that saves add to their turns over the time of as many blocking saves, where
training leaves one core free, as it does on a GPU; `all_cores` has the same where it leaves none. The memory of the
copy is made beforehand, as the trainer does after its first step.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as pliant.cli sets it: threads that wait leave the core to others

import itertools
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.nn.functional import cross_entropy

from pliant.cores import usable_cores
from pliant.engine import checkpoint
from pliant.engine.ranks import Ranks
from pliant.engine.saving import Saver
from pliant.experiment import Saving

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    steps: int = 50
    """Steps of a turn."""
    saves: int = 4
    """Turns with a save, and as many without; 4 turns of 50 are 200 steps."""
    rounds: int = 3
    """How often all that is done; medians over all turns count."""
    folder: Path | None = None
    """Where checkpoints are written; default: the system's temporary folder."""


class Training:
    """A network of 38 million weights, trained on noise: 300 MB with its momentum."""

    def __init__(self) -> None:
        widths = [3, 128, 512, 1024, 1024, 2240]
        convolutions = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
        ]
        self.net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 1000))
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (8,))
        self.step()

    def step(self) -> None:
        cross_entropy(self.net(self.images), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """As the trainer's: nested, by name."""
        momentum = {name: dict(self.optimizer.state[parameter]) for name, parameter in self.net.named_parameters()}
        return {"net": self.net.state_dict(), "optimizer": momentum}


def megabytes(state: dict[str, Any]) -> float:
    """Of all tensors in it."""
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() / 1e6
    return sum(megabytes(value) for value in state.values()) if isinstance(state, dict) else 0.0


def turn(training: Training, saver: Saver, number: int | None, steps: int) -> list[float]:
    """Seconds of a save, of each step after it, and of writing what was left then; without `number`, of steps alone."""
    taken = []
    for index in range(steps + 2):
        started = time.perf_counter()
        if index == 0 and number is not None:
            saver.save(number, training.state(), score=None, must=False)
        elif index == steps + 1:
            saver.settle()
        elif index:
            training.step()
        taken.append(time.perf_counter() - started)
    return taken


def blocking(training: Training, folder: Path, number: int) -> float:
    """Seconds of a save that training waits for."""
    started = time.perf_counter()
    checkpoint.save(folder, number, training.state(), score=None, keep=2)
    return time.perf_counter() - started


def extra(saving: list[list[float]], without: list[list[float]]) -> float:
    """Seconds that a save adds to its turn: the sum over places in a turn of the medians' differences. A shared machine
    slows single steps by more than a save costs; a median at each place passes that by."""
    with_medians, medians = (
        [statistics.median(place) for place in zip(*turns, strict=True)] for turns in (saving, without)
    )
    return sum(one - other for one, other in zip(with_medians, medians, strict=True))


def measure(settings: Settings, training: Training, threads: int) -> dict[str, float]:
    """What saving costs training that takes so many cores."""
    torch.set_num_threads(threads)
    training.step()
    saving: list[list[float]] = []
    without: list[list[float]] = []
    waits: list[float] = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        with Saver(folder / "background", ALONE, Saving(), print) as saver:
            saver.prepare(training.state())
            for number in range(settings.saves * settings.rounds):
                for saves in (True, False) if number % 2 else (False, True):
                    taken = turn(training, saver, number if saves else None, settings.steps)
                    (saving if saves else without).append(taken)
                waits.append(blocking(training, folder / "blocking", number))
                print(
                    f"{threads} of {usable_cores()} cores, turn {number + 1} of {settings.saves * settings.rounds}: a "
                    f"save adds {extra(saving, without):.2f} s, one that training waits for "
                    f"{statistics.median(waits):.2f} s",
                    flush=True,
                )
    one, wait = extra(saving, without), statistics.median(waits)
    return {
        "stall_ratio": round(one / wait, 4),
        "extra_s": round(settings.saves * one, 3),
        "blocking_s": round(settings.saves * wait, 3),
        "step_s": round(statistics.median(itertools.chain.from_iterable(turn[1:-1] for turn in without)), 4),
        "threads": threads,
    }


def main(settings: Settings) -> None:
    training = Training()
    cores = usable_cores()
    measured = [measure(settings, training, threads) for threads in (max(1, cores - 1), cores)]
    result = {
        "benchmark": "checkpoint_stall",
        **measured[0],
        "all_cores": measured[1],
        "megabytes": round(megabytes(training.state())),
        "steps": settings.saves * settings.steps,
        "saves": settings.saves,
        "rounds": settings.rounds,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
