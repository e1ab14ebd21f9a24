"""Batch-norm statistics: how they run while training, and how they are measured afterwards, point by point.

Running statistics move once per step, by the mean over its micro-batches. A moving average is linear, so the mean of
the ranks' copies, taken where they are read, is the same for any number of ranks; nothing is communicated in a step.

Post-statistics (US-Nets section 3.2) are measured on twins: copies of a network that share its weights and stand for
one point each. A layer is any that derives from torch's batch norms; a twin's layers hold that point's statistics in
`running_mean` and `running_var`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.recipe import Point, Recipe

Average = Literal["pooled", "cumulative", "moving"]


@dataclass(frozen=True)
class LayerStatistics:
    """What a batch norm normalises with at one point."""

    mean: Tensor
    """(C,), float32."""
    var: Tensor
    """(C,), float32."""


def norm_layers(net: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a network, by name."""
    return {name: module for name, module in net.named_modules() if isinstance(module, _BatchNorm)}


def running_buffers(net: nn.Module) -> list[Tensor]:
    """The running statistics of a network, in a fixed order."""
    return [
        buffer
        for layer in norm_layers(net).values()
        for buffer in layer.buffers(recurse=False)
        if buffer.is_floating_point()
    ]


class RunningStatistics:
    """Keeps a network's running statistics to one move per step, the mean of its micro-batches' moves; to none where
    the step was left out."""

    def __init__(self, net: nn.Module) -> None:
        self._buffers = running_buffers(net)
        self._count = 1
        self._before = [buffer.clone() for buffer in self._buffers]
        self._sum: list[Tensor] = []

    def begin(self, micro_batches: int) -> None:
        """Before the first of so many micro-batches."""
        self._count = micro_batches
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        if self._several:
            self._sum = [torch.zeros_like(buffer) for buffer in self._buffers]

    def end_micro_batch(self) -> None:
        """After each micro-batch: its move is set aside, and the next starts from where the step did."""
        if self._several:
            torch._foreach_add_(self._sum, self._buffers)
            torch._foreach_copy_(self._buffers, self._before)

    def end(self) -> None:
        """After the last one."""
        if self._several:
            torch._foreach_div_(self._sum, self._count)
            torch._foreach_copy_(self._buffers, self._sum)

    def settle(self, left_out: Tensor) -> None:
        """After the update: takes the move back on the device where `left_out`, a scalar, is 1. What overflowed would
        otherwise stay in the averages for good."""
        if self._buffers:
            kept = torch.where(left_out > 0, flat(self._before), flat(self._buffers))
            unflatten_(self._buffers, kept)

    @property
    def _several(self) -> bool:
        return self._count > 1 and bool(self._buffers)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one row, (n,), float32."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else torch.empty(0)


def unflatten_(tensors: Sequence[Tensor], row: Tensor) -> None:
    """Writes a row made by `flat` back, in place."""
    if tensors:
        parts = row.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(one) for part, one in zip(parts, tensors, strict=True)])


def mean_over_ranks(rows: Tensor, micro_batches: int) -> Tensor:
    """The mean of the ranks' running statistics, (ranks, n) to (n,), each weighted by its share of a step's
    micro-batches."""
    shares = [len(Ranks(rank, len(rows), rows.device).share(micro_batches)) for rank in range(len(rows))]
    weights = torch.tensor(shares, dtype=torch.float64, device=rows.device)
    return ((weights / weights.sum()) @ rows.double()).to(rows.dtype)


def twin(net: nn.Module) -> nn.Module:
    """A copy in evaluation mode that shares the parameters and has buffers of its own."""
    shared = {id(parameter): parameter for parameter in net.parameters()}
    return copy.deepcopy(net, memo=shared).eval()


def impose(net: nn.Module, statistics: Mapping[str, LayerStatistics]) -> nn.Module:
    """A twin whose batch norms normalise with these statistics; one without any did not run, and stays as it is."""
    one = twin(net)
    layers = norm_layers(one)
    like = next(net.parameters())
    for name, measured in statistics.items():
        layers[name].running_mean = measured.mean.to(like)
        layers[name].running_var = measured.var.to(like)
        layers[name].track_running_stats = True
    return one


class _Sums:
    """Weighted sums of a twin's batch statistics, which merge over ranks by adding."""

    def __init__(self, net: nn.Module, average: Average) -> None:
        self.average = average
        self.net = twin(net)
        self.sums: dict[str, Tensor] = {}
        self.weight = 1.0
        for name, layer in norm_layers(self.net).items():
            # With momentum 1 the layer's own kernel leaves the batch's mean and variance behind.
            layer.train().momentum = 1.0
            layer.track_running_stats = True
            layer.running_mean = layer.running_var = None
            layer.register_forward_pre_hook(_fresh_buffers)
            layer.register_forward_hook(partial(self._add, name))

    def _add(self, name: str, layer: _BatchNorm, args: tuple[Any, ...], output: Tensor) -> None:
        x: Tensor = args[0]
        assert layer.running_mean is not None and layer.running_var is not None
        values = x.numel() // x.shape[1]
        mean, var = layer.running_mean.double(), layer.running_var.double()
        if self.average == "pooled":
            weight = float(values)
            second = var * ((values - 1) / values) + mean.square()  # the kernel leaves the unbiased variance
        else:
            weight, second = self.weight, var
        row = torch.cat(
            [torch.full((1,), weight, dtype=torch.float64, device=x.device), weight * mean, weight * second]
        )
        self.sums[name] = self.sums[name] + row if name in self.sums else row

    def statistics(self) -> dict[str, LayerStatistics]:
        result = {}
        for name, row in self.sums.items():
            mean, second = (row[1:] / row[0]).chunk(2)
            var = (second - mean.square()).clamp_min(0) if self.average == "pooled" else second
            result[name] = LayerStatistics(mean.float(), var.float())
        return result


def _fresh_buffers(layer: _BatchNorm, args: tuple[Any, ...]) -> None:
    """Room for as many channels as this point's input has."""
    x: Tensor = args[0]
    if layer.running_mean is None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        layer.running_mean = torch.zeros(x.shape[1], device=x.device, dtype=dtype)
        layer.running_var = torch.ones(x.shape[1], device=x.device, dtype=dtype)


@torch.no_grad()
def calibrate(
    recipe: Recipe,
    net: nn.Module,
    points: Sequence[Point],
    batches: Iterable[tuple[int, Tensor]],
    *,
    average: Average,
    number: int,
    precision: Precision,
    ranks: Ranks,
) -> dict[Point, dict[str, LayerStatistics]]:
    """Collective. The batch-norm statistics of each point; each batch serves all points.

    Batch norms normalise with the batch's own statistics, as in training, and all else is in evaluation mode.

    Args:
        batches: this rank's, each with its index among all; images (B, 3, H, W), normalised.
        average: pooled, cumulative (Eq. 8) or moving (Eq. 5); see `experiment.Calibration`.
        number: batches over all ranks.
    """
    sums = {point: _Sums(net, average) for point in points}
    for index, images in batches:
        for point, one in sums.items():
            one.weight = _weight(average, index, number)
            with precision.autocast():
                recipe.predict(one.net, images, point)
    return {point: _merge(one, ranks) for point, one in sums.items()}


def _weight(average: Average, index: int, number: int) -> float:
    """A batch's share in an average over batches: equal, or that of Eq. 5 with m = 0.9 from the first batch on."""
    if average != "moving":
        return 1.0
    return 0.9 ** (number - 1) if index == 0 else 0.1 * 0.9 ** (number - 1 - index)


def _merge(one: _Sums, ranks: Ranks) -> dict[str, LayerStatistics]:
    """Collective. Ranks may have run unlike numbers of batches, but each at least one."""
    if ranks.count > 1 and one.sums:
        row = ranks.sum_(torch.cat(list(one.sums.values())))
        parts = row.split([part.numel() for part in one.sums.values()])
        one.sums = dict(zip(one.sums, parts, strict=True))
    return one.statistics()
