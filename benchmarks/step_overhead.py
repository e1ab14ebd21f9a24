"""What the engine adds to a step, over a bare PyTorch loop that does the same passes on the same batches.

    python benchmarks/step_overhead.py

The engine's side is its trainer's own loop: draws, anchor, finiteness flag, clock, log and TensorBoard every ten
steps. The bare side is four forwards and backwards and the same fused SGD. Both hold the same batches in memory, and
take turns of a few steps in one process. `overhead` is the ratio for the network of recipes/usnet_cifar10.py;
`extra_ms` is the difference per step for four passes of a network of one layer, where nothing hides it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.data import Batch
from pliant.engine.backends import wrap
from pliant.engine.folder import RunFolder
from pliant.engine.interruption import Interruption
from pliant.engine.optimization import make_optimizer, set_learning
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.schedule import make_schedule
from pliant.engine.telemetry import Telemetry
from pliant.engine.trainer import Trainer
from pliant.experiment import Experiment, Optimization
from pliant.methods.distillation import soft_cross_entropy, soft_labels
from pliant.randomness import Draw
from pliant.recipe import Native, Outcome, Pass, Point, Progress, Recipe
from pliant.record import load_recipe_file

EXPERIMENT: Experiment = load_recipe_file(Path(__file__).parents[1] / "recipes" / "usnet_cifar10.py").EXPERIMENT
ALONE = Ranks(0, 1, torch.device("cpu"))
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
    dataset = None

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches


def make_batches(images: int) -> list[Batch]:
    pixels = torch.randn(4, images, 3, 32, 32)
    return [
        Batch(one.to(memory_format=torch.channels_last), torch.randint(10, (images,)), torch.arange(images))
        for one in pixels
    ]


def engine_side(experiment: Experiment, net: nn.Module, batches: list[Batch], folder: Path) -> Callable[[int], None]:
    """Takes so many steps with the trainer's own loop."""
    config = dataclasses.replace(experiment.optimization, steps=MANY, warmup_epochs=0.0)
    experiment = dataclasses.replace(experiment, optimization=config, evaluate_epochs=0.0, log_steps=10)
    experiment = dataclasses.replace(experiment, saving=dataclasses.replace(experiment.saving, every_steps=MANY))
    schedule = make_schedule(experiment.recipe.stages(), config, steps_per_epoch=MANY)
    telemetry = Telemetry(RunFolder(folder), first=True, step=0)
    trainer = Trainer(
        experiment=experiment,
        ranks=ALONE,
        folder=RunFolder(folder),
        feed=MemoryFeed(batches),  # type: ignore[arg-type]
        net=net,
        schedule=schedule,
        precision=Precision("fp32", ALONE.device),
        telemetry=telemetry,
        interruption=Interruption(),
        micro_batches=[0],
        ema=None,
    )
    set_learning(net, schedule.stages[0])
    trainer.optimizer = make_optimizer(net, config)
    backend = wrap(net, ALONE, "single")
    endless = itertools.cycle(batches)

    def run(steps: int) -> None:
        first = trainer.state.step
        with contextlib.redirect_stdout(io.StringIO()):
            trainer._steps(0, range(first, first + steps), endless, backend)

    return run


def bare_cifar(net: nn.Module, batches: list[Batch], recipe: Recipe) -> Callable[[int], None]:
    """Algorithm 1 in a plain loop, each width's stem shared as the engine's side shares it."""
    optimizer = make_optimizer(net, Optimization(lr=0.1))
    endless, numbers = itertools.cycle(batches), itertools.count()
    net.train()

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = next(endless)
            widths = recipe.widths(net, Draw(0, 0, next(numbers), 0))  # type: ignore[attr-defined]
            soft = None
            for logits in net.at_each(batch.images, widths):  # type: ignore[operator]
                if soft is None:
                    loss = cross_entropy(logits, batch.labels)
                    soft = soft_labels(logits)
                else:
                    loss = soft_cross_entropy(logits, soft)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def bare_layer(net: nn.Module, batches: list[Batch]) -> Callable[[int], None]:
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


def alternate(
    ours: Callable[[int], None], bare: Callable[[int], None], turns: int, steps: int
) -> list[tuple[float, float]]:
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


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.threads)
    recipe = EXPERIMENT.recipe
    net, reference = (recipe.build(10).to(memory_format=torch.channels_last) for _ in range(2))  # type: ignore[call-overload]
    batches = make_batches(EXPERIMENT.batch.micro)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        ours = engine_side(EXPERIMENT, net, batches, path)
        pairs = alternate(ours, bare_cifar(reference, batches, recipe), settings.turns, settings.steps)
        small = dataclasses.replace(EXPERIMENT, recipe=OneLayer())
        few = make_batches(8)
        small_ours = engine_side(small, OneLayer().build(10), few, path)
        small_bare = bare_layer(OneLayer().build(10), few)
        small_pairs = alternate(small_ours, small_bare, settings.small_turns, settings.small_steps)
    overhead = statistics.median(mine / theirs for mine, theirs in pairs)
    extra = 1000 * statistics.median(mine - theirs for mine, theirs in small_pairs)
    print(
        f"US-Net step of {EXPERIMENT.name}: {statistics.median(mine for mine, _ in pairs):.3f} s in the engine, "
        f"{statistics.median(theirs for _, theirs in pairs):.3f} s bare"
    )
    print(
        f"four passes of one layer: {1000 * statistics.median(mine for mine, _ in small_pairs):.2f} ms in the engine, "
        f"{1000 * statistics.median(theirs for _, theirs in small_pairs):.2f} ms bare"
    )
    print(
        json.dumps(
            {
                "benchmark": "step_overhead",
                "overhead": round(overhead, 4),
                "extra_ms": round(extra, 3),
                "turns": settings.turns,
                "threads": settings.threads,
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
