"""What a training step communicates, per backend: calls and bytes, counted on two ranks over gloo.

    python benchmarks/communication.py

A US-MobileNetV2 of ImageNet's size takes four steps of four passes under each backend; the calls of the last step are
read from torch's profiler. Counts do not depend on the machine, and the bytes of a rank not on the number of ranks,
other than by the algorithm of the collective. Bytes are those handed to the collective by one rank.
"""

from __future__ import annotations

import json
import math
import socket
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro

from pliant.data import Batch
from pliant.engine.backends import wrap
from pliant.engine.batchnorm import RunningStatistics
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.step import accumulate
from pliant.experiment import BackendName, Optimization
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from pliant.randomness import Draw
from pliant.recipe import Progress

STEPS = 4


@dataclass(frozen=True)
class Settings:
    """What is counted."""

    backends: tuple[BackendName, ...] = ("ddp", "zero0", "zero1", "zero2", "zero3")
    micro_batches: int = 1
    """Micro-batches of each rank in a step."""


def count(ranks: Ranks, kind: BackendName, micro_batches: int) -> dict[str, Any]:
    """Collective. Calls and megabytes of the last step, by collective."""
    recipe, optimization = USNet(network=MobileNet()), Optimization(lr=0.01, clip=None)
    torch.manual_seed(0)
    net = recipe.build(1000)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    backend = wrap(net, ranks, kind, optimization, Precision("fp32", ranks.device))
    total = micro_batches * ranks.count
    for step in range(STEPS):
        indices = ranks.micro_batches(total)
        labels = torch.randint(1000, (2,))
        batches = [Batch(torch.randn(2, 3, 64, 64), labels, torch.arange(2), targets=labels) for _ in indices]
        draws = [Draw(0, 0, step, index) for index in indices]
        progress = Progress(stage=0, step=step, steps=STEPS, epoch=0, run_share=0.0)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
        ) as profile:
            accumulate(recipe, net, backend, RunningStatistics(net), batches, draws, progress, total)
            backend.update(0.01)
    calls: dict[str, list[float]] = defaultdict(list)
    for event in profile.events():
        if event.name.startswith("gloo:"):
            elements = sum(math.prod(shape) for shape in event.input_shapes if shape)
            calls[event.name.removeprefix("gloo:")].append(4 * elements / 1e6)
    return {
        "parameters_mb": round(4 * parameters / 1e6, 2),
        "calls": {name: len(sizes) for name, sizes in calls.items()},
        "megabytes": {name: round(sum(sizes), 2) for name, sizes in calls.items()},
    }


def _enter(rank: int, kind: BackendName, settings: Settings, port: int, answer: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    counted = count(Ranks(rank, 2, torch.device("cpu")), kind, settings.micro_batches)
    if rank == 0:
        answer.write_text(json.dumps(counted))
    dist.destroy_process_group()


def main(settings: Settings) -> None:
    counted = {}
    for kind in settings.backends:
        with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
            probe.bind(("127.0.0.1", 0))
            port, answer = probe.getsockname()[1], Path(folder) / "answer.json"
            probe.close()
            torch.multiprocessing.spawn(_enter, (kind, settings, port, answer), nprocs=2)
            counted[kind] = json.loads(answer.read_text())
        one = counted[kind]
        listed = ", ".join(
            f"{one['calls'][name]} {name} of {one['megabytes'][name]} MB in all" for name in one["calls"]
        )
        print(f"{kind}: {listed}; the parameters are {one['parameters_mb']} MB", flush=True)
    print(json.dumps({"benchmark": "communication", "micro_batches": settings.micro_batches, "backends": counted}))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
