"""The reduced gradient of a step against that of one process, which runs all the step's micro-batches in turn."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

from torch import Tensor

from pliant.engine.backends import Backend
from pliant.engine.backends.single import Single
from pliant.engine.batchnorm import RunningStatistics
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.step import accumulate
from pliant.errors import UserError
from pliant.experiment import Optimization
from pliant.randomness import Draw
from pliant.recipe import Batch, Progress, Recipe

_TOLERANCE = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 1e-2, "fp16": 1e-2}
"""Largest distance, in norms of the parameter's gradient. What ranks do differently is the order of a sum, which costs
less than 1e-5 in fp32; a gradient that stays local is off by 0.1 to 2."""


def verify(
    recipe: Recipe,
    backend: Backend,
    precision: Precision,
    ranks: Ranks,
    micro_batches: Sequence[Batch],
    seed: int,
    progress: Progress,
    total: int,
) -> None:
    """Collective. To be called between the passes of a step and its update.

    Args:
        micro_batches: this rank's.
        total: micro-batches of the step over all ranks.

    Raises:
        UserError: a gradient differs; the sentence names the first such parameter.
    """
    got = backend.gradients()
    net = copy.deepcopy(backend.whole())
    alone = Precision(precision.name, ranks.device)
    alone.load(precision.state())
    one = Single(net, Optimization(), alone)
    accumulate(
        recipe,
        net,
        one,
        RunningStatistics(net),
        gathered(micro_batches, ranks, total),
        [Draw(seed, progress.stage, progress.step, index) for index in range(total)],
        progress,
        total,
    )
    found = difference(got, one.gradients(), _TOLERANCE[precision.name])
    found = next((text for text in ranks.all(found) if text is not None), None)
    if found is not None:
        raise UserError(
            f"{found} (step {progress.step} of stage {progress.stage}, {ranks.count} ranks): with this recipe the "
            f"backend {type(backend).__name__} does not train what one process trains. Write --backend ddp, or single "
            "on one rank, and tell us."
        )


def gathered(micro_batches: Sequence[Batch], ranks: Ranks, total: int) -> list[Batch]:
    """Collective. All micro-batches of the step, in their order, on every rank."""
    own = dict(zip(ranks.micro_batches(total), micro_batches, strict=True))
    like = micro_batches[0]
    batches: list[Batch] = []
    for index in range(total):
        owner = next(rank for rank in range(ranks.count) if index in replace(ranks, rank=rank).share(total))
        source = own.get(index, like)
        parts = {name: getattr(source, name).clone() for name in ("images", "labels", "targets")}
        batches.append(SimpleNamespace(**{name: ranks.from_rank(owner, part) for name, part in parts.items()}))
    return batches


def difference(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float) -> str | None:
    """The first parameter whose gradients are further apart than `tolerance` times their norm; None if none is.

    Gradients so small that rounding alone makes them (the bias before a batch norm) are held to the mean norm.
    """
    norms = {name: gradient.double().norm().item() for name, gradient in want.items()}
    floor = 1e-3 * sum(norms.values()) / max(1, len(norms))
    for name, gradient in want.items():
        mine = got.get(name)
        apart = norms[name] if mine is None else (mine.double() - gradient.double()).norm().item()
        if not apart <= tolerance * max(norms[name], floor):
            return f"The gradient of {name} is {apart / max(norms[name], 1e-30):.2g} times its norm off"
    return None
