"""From an experiment to a trained network: everything is checked before anything is allocated or written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from pliant import record
from pliant.cores import usable_cores
from pliant.data import Feed, open_dataset
from pliant.data.index import Index
from pliant.engine import checkpoint, folder
from pliant.engine.backends import require_served
from pliant.engine.compilation import compile_net, graphs_to_compile
from pliant.engine.folder import RunFolder
from pliant.engine.interruption import listening
from pliant.engine.launch import honoured
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.resuming import changes
from pliant.engine.sameness import require_same_as_begun, require_same_on_ranks
from pliant.engine.saving import Saver
from pliant.engine.schedule import Schedule, make_schedule
from pliant.engine.telemetry import Telemetry
from pliant.engine.trainer import Trainer
from pliant.engine.watchdog import watchdog
from pliant.errors import UserError, printable
from pliant.experiment import Experiment
from pliant.randomness import philox

T = TypeVar("T")


def train(experiment: Experiment, ranks: Ranks, recipe_file: Path | None = None) -> RunFolder:
    """Collective. Trains, or goes on training; the folder of the run.

    Raises:
        UserError: something asked for cannot be done.
        Interrupted: a signal came, and a checkpoint was written.
    """
    with ExitStack() as held:
        return _train(_open(honoured(experiment), ranks, recipe_file, held), ranks)


def _train(opened: _Opened, ranks: Ranks) -> RunFolder:
    experiment, feed, run = opened.experiment, opened.feed, opened.run
    with (
        Telemetry(run, first=ranks.first, step=opened.step) as telemetry,
        Saver(run.checkpoints, ranks, experiment.saving, telemetry.warn) as saver,
        watchdog(run.path, ranks, experiment.timeout_minutes) as guard,
        listening() as interruption,
    ):
        for note in opened.notes:
            telemetry.warn(note)
        for split in _indexed(feed):  # the note names a few
            for position in split.broken.tolist():
                reason = split.reason(position)
                telemetry.event("broken", image=printable(split.path(position)), reason=reason)
        if ranks.first:  # the others' telemetry is silent, and each rank sees its own images
            feed.faults.tell = telemetry.warn
        telemetry.say(_introduction(opened))
        trainer = Trainer(
            experiment=experiment,
            ranks=ranks,
            folder=run,
            feed=feed,
            net=opened.net,
            schedule=opened.schedule,
            precision=Precision(experiment.precision, ranks.device),
            telemetry=telemetry,
            interruption=interruption,
            saver=saver,
            watchdog=guard,
            ema=_make_ema(experiment, opened.net),
        )
        if opened.graphs is not None:
            compile_net(opened.net, opened.graphs)
        telemetry.event("start", step=opened.step, ranks=ranks.count)
        trainer.run(opened.restored)
        broken = _broken(feed, ranks, telemetry)
        telemetry.event("end", step=trainer.state.step, seconds=trainer.state.seconds, **broken)
    return run


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """All that a training begins with."""

    experiment: Experiment
    feed: Feed
    schedule: Schedule
    run: RunFolder
    net: nn.Module
    step: int
    """Steps done already."""
    restored: Any
    """The state of the checkpoint that it goes on from."""
    graphs: int | None
    """How many graphs are to be compiled, if any."""
    notes: list[str]
    """What to warn of."""


def _open(experiment: Experiment, ranks: Ranks, recipe_file: Path | None, held: ExitStack) -> _Opened:
    """Collective. Checks all that can be checked, then allocates the network and makes or finds the run's folder, which
    is this training's alone until `held` ends."""
    if ranks.device.type == "cpu":
        torch.set_num_threads(experiment.threads or threads_per_rank())
    if ranks.first:
        print(
            f"{_count(ranks.count, 'rank')} on {ranks.device.type}, {_count(torch.get_num_threads(), 'thread')} each",
            flush=True,
        )
    require_served(experiment.backend, ranks)
    ranks.micro_batches(experiment.batch.micro_batches)  # refuses more ranks than there are
    graphs = graphs_to_compile(experiment)
    run, found, notes = _agreed(ranks, lambda: _found(experiment, held))
    if run is None:
        experiment.data.refuse_idle()
    feed = make_feed(experiment, ranks)
    stages = experiment.recipe.stages()
    per_epoch = [feed.steps_of_epoch(stage.batch) for stage in stages]
    schedule = make_schedule(stages, experiment.optimization, per_epoch)
    restored = None if found is None else found.load()
    if restored is not None and run is not None:
        notes += require_same_as_begun(restored.get("images"), feed.dataset.train.fingerprint, run.path)
    net = build_net(experiment, feed.dataset.num_classes, ranks.device)
    if found is None:
        with _warned() as said:
            experiment.recipe.start(net)
        notes += said
    if run is not None:
        _agreed(ranks, partial(folder.keep_changes, experiment, run))
    return _Opened(
        experiment=experiment,
        feed=feed,
        schedule=schedule,
        run=run or _agreed(ranks, lambda: _new(experiment, recipe_file, held)),
        net=net,
        step=0 if found is None else found.step,
        restored=restored,
        graphs=graphs,
        notes=[*feed.dataset.notes(), *notes],
    )


def _broken(feed: Feed, ranks: Ranks, telemetry: Telemetry) -> dict[str, int]:
    """Collective. How many images were known to be broken, and how many were found to be while the run lasted, by all
    ranks together; those that rank 0 has not met are told of now."""
    own = feed.faults.found
    met: dict[str, str] = {}
    for theirs in ranks.all(own):
        met |= theirs
    elsewhere = sorted(met.keys() - own.keys())
    for path in elsewhere:
        telemetry.event("broken", image=printable(path), reason=met[path])
    if elsewhere:
        more = _count(len(elsewhere), "more image")
        telemetry.warn(f"{more} turned out to be broken on other ranks; log.jsonl names all.")
    return {"broken": len(met), "broken_known": sum(len(split.broken) for split in _indexed(feed))}


def _indexed(feed: Feed) -> list[Index]:
    """The splits whose images lie in files."""
    dataset = feed.dataset
    return [split for split in (dataset.train, dataset.held_out, dataset.val) if isinstance(split, Index)]


def threads_per_rank() -> int:
    """The cores that this process may use, shared out among the ranks of this machine.

    Launchers set OMP_NUM_THREADS to 1, as suits machines with GPUs; on CPUs that leaves cores idle.
    """
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def make_feed(experiment: Experiment, ranks: Ranks) -> Feed:
    """Collective. The images of an experiment, on this rank's device.

    Raises:
        UserError: they cannot be used; or ranks see different ones.
    """
    dataset = open_dataset(experiment.data, experiment.seed)
    require_same_on_ranks(dataset, ranks)
    return Feed(
        dataset, experiment.data, experiment.batch, seed=experiment.seed, device=ranks.device, dtype=_dtype(experiment)
    )


def build_net(experiment: Experiment, classes: int, device: torch.device) -> nn.Module:
    """The network of an experiment before its first step, the same on every rank."""
    torch.manual_seed(int(philox(experiment.seed, "weights").integers(2**63)))
    net = experiment.recipe.build(classes).to(device=device, dtype=_dtype(experiment))
    return net.to(memory_format=torch.channels_last)  # type: ignore[no-any-return,call-overload]


def _dtype(experiment: Experiment) -> torch.dtype:
    return torch.float64 if experiment.precision == "fp64" else torch.float32


def _agreed(ranks: Ranks, decide: Callable[[], T]) -> T:
    """Collective. What rank 0 decides, or the refusal or the full disk that it meets, on every rank."""
    answer: Any = None
    if ranks.first:
        try:
            answer = decide()
        except (UserError, OSError) as error:
            answer = error
    answer = ranks.from_first(answer)
    if isinstance(answer, UserError | OSError):
        raise answer
    decided: T = answer
    return decided


def _new(experiment: Experiment, recipe_file: Path | None, held: ExitStack) -> RunFolder:
    run = folder.create(experiment, recipe_file)
    held.enter_context(folder.alone_in(run.path))
    return run


def _found(experiment: Experiment, held: ExitStack) -> tuple[RunFolder | None, checkpoint.Checkpoint | None, list[str]]:
    """The run to go on with, if any, and its newest whole checkpoint; and what to warn of.

    Raises:
        UserError: it was begun with other settings, or holds no whole checkpoint.
    """
    if experiment.resume is None:
        return None, None, []
    run = folder.newest(experiment) if experiment.resume == "auto" else RunFolder(Path(experiment.resume))
    if run is None:
        return None, None, []
    notes = changes(record.load(run.path), experiment, run.path)
    held.enter_context(folder.alone_in(run.path))  # what trains there until now may still write a checkpoint
    with _warned() as said:
        found = checkpoint.newest(run.checkpoints)
    if found is None:
        damaged = "".join(f" ({text})" for text in said)
        raise UserError(
            f"{run.path} holds no whole checkpoint to go on with{damaged}: leave --resume out to begin anew."
        )
    return run, found, [*notes, *said]


@contextmanager
def _warned() -> Iterator[list[str]]:
    """Fills the list with what is warned of in the block: for the log, not for stderr."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(one.message) for one in caught]


def _introduction(opened: _Opened) -> str:
    experiment, feed, dataset = opened.experiment, opened.feed, opened.feed.dataset
    parameters = sum(parameter.numel() for parameter in opened.net.parameters())
    kind = "generated training images" if dataset.generated else "training images"
    held = "" if dataset.held_out is None else f", {len(dataset.held_out)} held out"
    return (
        f"{experiment.name}: {type(experiment.recipe).__name__}, {parameters:,} parameters, "
        f"{dataset.num_classes} classes\n"
        f"{len(dataset.train)} {kind}{held}, by {feed.loader}; {opened.schedule.total} steps of "
        f"{experiment.batch.images} images in micro-batches of {experiment.batch.micro}, {experiment.precision}"
        f"{_backend(experiment)}\n"
        f"run folder {opened.run.path}"
    )


def _backend(experiment: Experiment) -> str:
    return f", DeepSpeed ZeRO {experiment.backend[-1]}" if experiment.backend.startswith("zero") else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _make_ema(experiment: Experiment, net: nn.Module) -> Any:
    if experiment.optimization.ema is None:
        return None
    from pliant.torchvision_cpu import make_importable

    make_importable()
    from timm.utils.model_ema import ModelEmaV3  # slow to import

    # The decay of an update is at most 1 - 10 / (10 + updates before it).
    return ModelEmaV3(net, decay=experiment.optimization.ema, use_warmup=True, warmup_gamma=10.0, warmup_power=1.0)
