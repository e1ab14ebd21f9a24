"""Which layers each rank's passes run, in which order: measured before a backend relies on it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from pliant.engine.backends.single import Single
from pliant.engine.batchnorm import RunningStatistics
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.step import accumulate
from pliant.errors import UserError
from pliant.experiment import Optimization
from pliant.randomness import Draw
from pliant.recipe import Batch, Progress, Recipe


def rehearse(
    recipe: Recipe,
    net: nn.Module,
    precision: Precision,
    ranks: Ranks,
    micro_batches: Sequence[Batch],
    draws: Sequence[Draw],
    progress: Progress,
) -> None:
    """Collective. Runs a step's passes on a copy of the network, each rank for itself, and compares what ran.

    Raises:
        UserError: ranks ran unlike layers, or another order of them, or unlike numbers of micro-batches.
    """
    rehearsed = copy.deepcopy(net)
    alone = Precision(precision.name, ranks.device)
    with _recording(rehearsed) as ran:
        accumulate(
            recipe,
            rehearsed,
            Single(rehearsed, Optimization(), alone),
            RunningStatistics(rehearsed),
            micro_batches,
            draws,
            progress,
            len(draws),
        )
    for rank, theirs in enumerate(ranks.all(ran)):
        if theirs != ran:
            place = next((i for i, (a, b) in enumerate(zip(ran, theirs, strict=False)) if a != b), None)
            where = (
                f"rank {ranks.rank} ran {len(ran)} layers and rank {rank} {len(theirs)}"
                if place is None
                else f"rank {ranks.rank} ran {ran[place]} where rank {rank} ran {theirs[place]}"
            )
            raise UserError(
                f"ZeRO 3 needs every rank to run the same layers in the same order, and in step {progress.step} "
                f"{where}: write --backend zero2 or ddp."
            )


@contextmanager
def _recording(net: nn.Module) -> Iterator[list[str]]:
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(partial(_note, ran, name))
        for name, module in net.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def _note(ran: list[str], name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
    ran.append(name)
