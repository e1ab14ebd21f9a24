"""Layers that run on the first k of their channels (US-Nets, Eq. 2).

The number of active channels is an argument, or is read off the input: no layer remembers a width. Slicing takes
views, never copies.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def active_channels(channels: int, ratio: float, divisor: int) -> int:
    """Channels of a layer of `channels` at width `ratio` (US-Nets section 5.2).

    The nearest multiple of `divisor`, one multiple more where rounding loses over a tenth, as in the authors' code
    and in MobileNetV2's; the paper's formula prints a floor. Never more than `channels`, and all of them at 1.

    Raises:
        ValueError: no multiple of the divisor fits into the layer.
    """
    if divisor < 1:
        raise ValueError(f"A width divisor is at least 1, not {divisor}: write for instance 8.")
    if divisor > channels:
        raise ValueError(
            f"A width divisor of {divisor} leaves no channel in a layer of {channels}: "
            f"write a divisor of at most {channels}."
        )
    if ratio >= 1.0:
        return channels
    wanted = channels * ratio
    rounded = int(wanted + divisor / 2) // divisor * divisor
    if rounded < 0.9 * wanted:
        rounded += divisor
    return min(rounded, channels)


class SlimmableConv2d(nn.Conv2d):
    """A convolution on the first channels of its input, to the first of its output.

    Dense: any number of either. Grouped and depthwise: whole groups, the first ones; the outputs follow the inputs.
    With `average`, the weighted sum is multiplied by all inputs over active inputs (US-Nets section 6), which stands
    in for private scales where no batch norm follows.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, average: bool = False
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.average = average

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """(B, C, H, W) to (B, outputs, H', W').

        Raises:
            ValueError: the inputs are no whole number of groups.
        """
        inputs = x.shape[1]
        if self.groups == 1:
            groups = 1
            weight = self.weight[: outputs or self.out_channels, :inputs]
        else:
            per_group = self.in_channels // self.groups
            groups, rest = divmod(inputs, per_group)
            if rest:
                raise ValueError(f"{inputs} channels are no whole number of groups of {per_group}.")
            weight = self.weight[: groups * (self.out_channels // self.groups)]
            if self.average:
                raise ValueError("A grouped convolution sums over one group, whatever the width: nothing to average.")
        if self.average:
            weight = weight * (self.in_channels / inputs)
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)


class SlimmableLinear(nn.Linear):
    """A linear layer on the first features of its input, to all or the first of its output."""

    def __init__(self, inputs: int, outputs: int, *, average: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.average = average

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        """(B, inputs) to (B, outputs)."""
        outputs = outputs or self.out_features
        weight = self.weight[:outputs, : x.shape[1]]
        if self.average:
            weight = weight * (self.in_features / x.shape[1])
        return F.linear(x, weight, self.bias[:outputs])


class SlimmableBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the first channels, with a set of running statistics for each tracked width.

    Scale and shift are shared by all widths, or private to each set. In training mode the batch's own statistics
    normalise, and move the set that is named, if one is. In evaluation mode the set that is named normalises.
    Statistics imposed from outside (`running_mean`, `running_var`, None until then) take the place of every set: so
    a copy of a network stands for one calibrated point.

    Args:
        channels: at full width.
        sets: channels of each tracked width.
        private: one scale and shift for each set (S-Net's option) instead of one for all.
    """

    def __init__(self, channels: int, sets: Sequence[int], *, private: bool = False) -> None:
        super().__init__(channels, affine=not private, track_running_stats=False)
        self.channels_of_sets = tuple(sets)
        self.private = private
        for index, count in enumerate(sets):
            self.register_buffer(f"mean_{index}", torch.zeros(count))
            self.register_buffer(f"var_{index}", torch.ones(count))
        if private:
            self.weights = nn.ParameterList(torch.ones(count) for count in sets)
            self.biases = nn.ParameterList(torch.zeros(count) for count in sets)

    @property
    def last_set(self) -> int:
        """Index of the last set; a layer that no width changes has one set, 0, for all."""
        return len(self.channels_of_sets) - 1

    def statistics(self, index: int | None, channels: int) -> tuple[Tensor | None, Tensor | None]:
        """Mean and variance that evaluation normalises with, each (channels,); None where there are none."""
        if self.running_mean is not None:
            return self.running_mean, self.running_var
        if index is None:
            return None, None
        return getattr(self, f"mean_{index}")[:channels], getattr(self, f"var_{index}")[:channels]

    def affine_at(self, index: int | None, channels: int) -> tuple[Tensor, Tensor]:
        """Scale and shift, each (channels,).

        Raises:
            ValueError: they are private, and no set is named.
        """
        if not self.private:
            return self.weight[:channels], self.bias[:channels]
        if index is None:
            raise ValueError("Scale and shift are private to the trained widths, and this width is none of them.")
        return self.weights[index][:channels], self.biases[index][:channels]

    def forward(self, x: Tensor, index: int | None = None) -> Tensor:
        """(B, C, H, W), normalised; `index` names the set.

        Raises:
            ValueError: evaluation mode, and neither a set nor imposed statistics: calibrate first.
        """
        channels = x.shape[1]
        mean, var = self.statistics(index, channels)
        if mean is None and not self.training:
            raise ValueError("Batch norm has no statistics for this width: calibrate it first.")
        weight, bias = self.affine_at(index, channels)
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(x, mean, var, weight, bias, self.training, momentum, self.eps)
