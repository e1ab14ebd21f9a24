"""The step: several passes over several micro-batches, one reduction, one update.

Forward and backward of a pass run in the same state of reduction, and each pass's graph is freed before the next
begins. The last pass on a rank is anchored: every learning parameter takes part in it on every rank, so a parameter
that only an earlier pass touched, or only another rank, is reduced all the same. One that no pass touched has a zero
gradient, on one process too, so that weight decay and momentum treat it alike everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.engine.backends import Backend
from pliant.engine.batchnorm import RunningStatistics
from pliant.errors import UserError
from pliant.randomness import Draw
from pliant.recipe import Batch, Pass, Progress, Recipe


@dataclass(frozen=True)
class Losses:
    """What the passes of a step said, left on the device."""

    names: list[str] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    """One loss per pass and micro-batch of this rank, in the order they ran."""
    metric_names: list[str] = field(default_factory=list)
    metric_values: list[Tensor] = field(default_factory=list)

    def add(self, one: Pass) -> None:
        """Keeps a pass's loss and metrics, without their graph."""
        self.names.append(one.name)
        self.values.append(one.loss.detach())
        for name, value in one.metrics.items():
            self.metric_names.append(f"{name}/{one.name}")
            self.metric_values.append(value.detach())


def accumulate(
    recipe: Recipe,
    net: nn.Module,
    backend: Backend,
    running: RunningStatistics,
    micro_batches: Iterable[Batch],
    draws: Sequence[Draw],
    progress: Progress,
    total: int,
    reducing: Callable[[], None] = lambda: None,
) -> Losses:
    """Collective. Leaves the gradient of the mean over the global batch's micro-batches with the backend.

    Args:
        micro_batches: this rank's, in the order of `draws`.
        draws: one per micro-batch of this rank.
        total: micro-batches of the step over all ranks.
        reducing: called when this rank has done all that it can do alone, before it waits for others.

    Raises:
        UserError: the recipe yields another number of passes than it declares, or a loss that is no scalar.
    """
    declared = recipe.passes(progress)
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    share = backend.averaged / total
    losses = Losses()
    running.begin(len(draws))
    with backend.step():
        for index, (micro_batch, draw) in enumerate(zip(micro_batches, draws, strict=True), start=1):
            torch.manual_seed(draw.torch_seed("dropout"))
            passes = recipe.iteration(net, micro_batch, draw, progress)
            for number in range(1, declared + 1):
                last = index == len(draws) and number == declared
                one = _checked(recipe, backend.forward(passes, reduces=last), number, declared)
                losses.add(one)
                if last:
                    reducing()
                loss = one.loss * share
                backend.backward(_anchored(loss, learning) if last and backend.anchored else loss)
                del one, loss
            if next(passes, None) is not None:
                raise UserError(_miscount(recipe, declared, "more"))
            running.end_micro_batch()
    running.end()
    return losses


class _Anchor(torch.autograd.Function):
    """The loss, unchanged, with a zero gradient for every parameter: each takes part in the backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        ctx.zero = torch.zeros((), dtype=torch.float32, device=loss.device)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient, *(ctx.zero.expand(shape) for shape in ctx.shapes))


def _anchored(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    anchored: Tensor = _Anchor.apply(loss, *parameters)  # type: ignore[no-untyped-call]
    return anchored


def _checked(recipe: Recipe, one: Pass | None, number: int, declared: int) -> Pass:
    if one is None:
        raise UserError(_miscount(recipe, declared, str(number - 1)))
    if one.loss.ndim != 0 or not one.loss.requires_grad:
        raise UserError(
            f"{type(recipe).__name__} yields a loss for pass {one.name!r} that is no scalar with a graph: its shape is "
            f"{tuple(one.loss.shape)}; take the mean over the micro-batch, and do not detach it."
        )
    return one


def _miscount(recipe: Recipe, declared: int, yielded: str) -> str:
    name = type(recipe).__name__
    return f"{name}.passes() declares {declared}, and {name}.iteration() yields {yielded}: mend one of them."
