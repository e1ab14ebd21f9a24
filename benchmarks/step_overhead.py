"""What the engine adds to a step, over a bare PyTorch loop that does the same passes on the same batches.

    python benchmarks/step_overhead.py

The engine's side is its trainer's own loop: draws, anchor, finiteness flag, clock, log and TensorBoard every ten
steps. The bare side is four forwards and backwards and the same fused SGD. Both hold the same batches in memory, and
take turns of a few steps in one process. `overhead` is the ratio for the network of recipes/usnet_cifar10.py;
`extra_ms` is the difference per step for four passes of a network of one layer, where nothing hides it.

`overhead_2_ranks` is that ratio for two processes over gloo with a thread each. The bare side there is
DistributedDataParallel with the first three passes in no_sync and find_unused_parameters, without which its last,
narrow pass would leave parameters unreduced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from pliant.data import Batch
from pliant.data.index import Pixels
from pliant.engine.agreement import Beats
from pliant.engine.backends import wrap
from pliant.engine.folder import RunFolder
from pliant.engine.interruption import Interruption
from pliant.engine.optimization import make_optimizer, set_learning
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.saving import Saver
from pliant.engine.schedule import make_schedule
from pliant.engine.telemetry import Telemetry
from pliant.engine.trainer import Trainer
from pliant.engine.watchdog import Watchdog
from pliant.experiment import Batching, Experiment, Optimization
from pliant.methods.distillation import soft_cross_entropy, soft_labels
from pliant.randomness import Draw
from pliant.recipe import Native, Outcome, Pass, Point, Progress, Recipe
from pliant.record import load_recipe_file

EXPERIMENT: Experiment = load_recipe_file(Path(__file__).parents[1] / "recipes" / "usnet_cifar10.py").EXPERIMENT
ALONE = Ranks(0, 1, torch.device("cpu"))
Side = Callable[[int], None]
MANY = 10**6


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    turns: int = 12
    """Turns of each side for the real network, after one to warm up."""
    steps: int = 2
    """Steps of a turn for the real network."""
    small_turns: int = 40
    """Turns of each side for the small one."""
    small_steps: int = 50
    threads: int = 2
    """Threads of the one process; each of the two ranks has one."""
    ranks: bool = True
    """Measure two ranks as well."""


@dataclass(frozen=True, kw_only=True)
class OneLayer(Recipe):
    """Four passes of a linear layer on the mean colour."""

    def build(self, classes: int) -> nn.Module:
        return nn.Linear(3, classes)

    def passes(self, progress: Progress) -> int:
        return 4

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        for number in range(4):
            yield Pass(f"pass{number}", cross_entropy(net(batch.images.mean((2, 3))), batch.labels))

    def points(self) -> tuple[Point, ...]:
        return (Native(),)

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        return Outcome(net(images.mean((2, 3))))


class MemoryFeed:
    """Stands in for the images: the same few batches for ever."""

    loader = "memory"
    dataset = SimpleNamespace(train=Pixels(np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0, np.int32), ()))

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches


def make_batches(images: int) -> list[Batch]:
    pixels, labels = torch.randn(4, images, 3, 32, 32), torch.randint(10, (4, images))
    return [
        Batch(one.to(memory_format=torch.channels_last), own, torch.arange(images), targets=own)
        for one, own in zip(pixels, labels, strict=True)
    ]


def engine_side(
    experiment: Experiment, net: nn.Module, batches: list[Batch], folder: Path, ranks: Ranks = ALONE
) -> Side:
    """Takes so many steps with the trainer's own loop."""
    config = dataclasses.replace(experiment.optimization, steps=MANY, warmup_epochs=0.0)
    experiment = dataclasses.replace(experiment, optimization=config, evaluate_epochs=0.0, log_steps=10)
    experiment = dataclasses.replace(experiment, saving=dataclasses.replace(experiment.saving, every_steps=MANY))
    schedule = make_schedule(experiment.recipe.stages(), config, steps_per_epoch=[MANY])
    telemetry = Telemetry(RunFolder(folder), first=ranks.first, step=0)
    trainer = Trainer(
        experiment=experiment,
        ranks=ranks,
        folder=RunFolder(folder),
        feed=MemoryFeed(batches),  # type: ignore[arg-type]
        net=net,
        schedule=schedule,
        precision=Precision("fp32", ranks.device),
        telemetry=telemetry,
        interruption=Interruption(),
        saver=Saver(folder / "checkpoints", ranks, experiment.saving, telemetry.warn),
        watchdog=Watchdog(None, 0.0),
        ema=None,
    )
    set_learning(net, schedule.stages[0])
    trainer.backend = wrap(net, ranks, "auto", config, trainer.precision)
    trainer.beats = Beats(ranks)
    endless = itertools.cycle(batches)

    def run(steps: int) -> None:
        first = trainer.state.step
        with contextlib.redirect_stdout(io.StringIO()):
            trainer._steps(0, range(first, first + steps), endless)

    return run


class NextLogits(nn.Module):
    """What DistributedDataParallel wraps: the next pass of an iteration over widths."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, passes: Iterator[Tensor]) -> Tensor:
        return next(passes)


def bare_cifar(net: nn.Module, batches: list[Batch], recipe: Recipe, ranks: int = 1) -> Side:
    """Algorithm 1 in a plain loop, each width's stem shared as the engine's side shares it."""
    optimizer = make_optimizer(net, Optimization(lr=0.1))
    endless, numbers = itertools.cycle(batches), itertools.count()
    net.train()
    module: Any = NextLogits(net)
    if ranks > 1:
        module = DistributedDataParallel(module, find_unused_parameters=True, broadcast_buffers=False)

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(endless)
            widths = recipe.widths(net, Draw(0, 0, next(numbers), 0))  # type: ignore[attr-defined]
            soft = None
            passes = net.at_each(batch.images, widths)  # type: ignore[operator]
            for number in range(len(widths)):
                held = module.no_sync() if ranks > 1 and number < len(widths) - 1 else contextlib.nullcontext()
                with held:
                    logits = module(passes)
                    if soft is None:
                        loss = cross_entropy(logits, batch.labels)
                        soft = soft_labels(logits)
                    else:
                        loss = soft_cross_entropy(logits, soft)
                    loss.backward()
            next(passes, None)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def bare_layer(net: nn.Module, batches: list[Batch]) -> Side:
    """Four passes of one layer in a plain loop."""
    optimizer = make_optimizer(net, Optimization(lr=0.1))
    endless = itertools.cycle(batches)

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(endless)
            for _ in range(4):
                cross_entropy(net(batch.images.mean((2, 3))), batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def alternate(ours: Side, bare: Side, turns: int, steps: int) -> list[tuple[float, float]]:
    """Seconds per step of each side, turn by turn; who goes first changes each time."""
    ours(steps)
    bare(steps)
    pairs = []
    for turn in range(turns):
        taken = {}
        for side in (ours, bare) if turn % 2 else (bare, ours):
            started = time.perf_counter()
            side(steps)
            taken[side] = (time.perf_counter() - started) / steps
        pairs.append((taken[ours], taken[bare]))
    return pairs


def cifar_pairs(settings: Settings, folder: Path, ranks: Ranks) -> list[tuple[float, float]]:
    """Seconds per step in the engine and bare, of the network of recipes/usnet_cifar10.py."""
    recipe = EXPERIMENT.recipe
    net, reference = (recipe.build(10).to(memory_format=torch.channels_last) for _ in range(2))  # type: ignore[call-overload]
    batches = make_batches(EXPERIMENT.batch.micro)
    batching = Batching(images=ranks.count * EXPERIMENT.batch.micro, micro=EXPERIMENT.batch.micro)
    ours = engine_side(dataclasses.replace(EXPERIMENT, batch=batching), net, batches, folder, ranks)
    bare = bare_cifar(reference, batches, recipe, ranks.count)
    return alternate(ours, bare, settings.turns, settings.steps)


def _enter(rank: int, settings: Settings, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    pairs = cifar_pairs(settings, folder, Ranks(rank, 2, torch.device("cpu")))
    if rank == 0:
        (folder / "pairs.json").write_text(json.dumps(pairs))
    dist.destroy_process_group()


def two_ranks(settings: Settings, folder: Path) -> list[tuple[float, float]]:
    """`cifar_pairs` over two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_enter, (settings, folder, port), nprocs=2)
    return [(ours, bare) for ours, bare in json.loads((folder / "pairs.json").read_text())]


def say(what: str, pairs: list[tuple[float, float]]) -> float:
    """One line for a person; the median ratio."""
    ours, bare = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    print(f"{what}: {1000 * ours:.2f} ms in the engine, {1000 * bare:.2f} ms bare", flush=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overhead = say(f"US-Net step of {EXPERIMENT.name}", cifar_pairs(settings, folder, ALONE))
        small = dataclasses.replace(EXPERIMENT, recipe=OneLayer())
        few = make_batches(8)
        pairs = alternate(
            engine_side(small, OneLayer().build(10), few, folder),
            bare_layer(OneLayer().build(10), few),
            settings.small_turns,
            settings.small_steps,
        )
        say("four passes of one layer", pairs)
        extra = 1000 * statistics.median(mine - theirs for mine, theirs in pairs)
        several = say("US-Net step on two ranks", two_ranks(settings, folder)) if settings.ranks else None
    print(
        json.dumps(
            {
                "benchmark": "step_overhead",
                "overhead": round(overhead, 4),
                "extra_ms": round(extra, 3),
                "overhead_2_ranks": None if several is None else round(several, 4),
                "turns": settings.turns,
                "threads": settings.threads,
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
