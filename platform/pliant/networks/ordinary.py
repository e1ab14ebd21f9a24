"""An ordinary network cut out of a slimmable one: plain layers with sliced weights and one set of statistics.

What is exported, and what parameters are counted on. Nothing of this package is needed to run it.
"""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pliant.networks.slimmable import SlimmableBatchNorm2d, SlimmableConv2d, SlimmableLinear

if TYPE_CHECKING:
    from pliant.networks.mobilenet import SlimmableNet, WidthLike


class Residual(nn.Module):
    """A sequence of layers, with its input added to its output where `residual`."""

    def __init__(self, conv: nn.Sequential, residual: bool) -> None:
        super().__init__()
        self.conv = conv
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


def conv_norm_activation(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """The three layers, padded to keep the size at stride 1."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


@torch.no_grad()
def ordinary(net: SlimmableNet, width: WidthLike) -> nn.Module:
    """The network at `width` as plain layers, in evaluation mode; its logits are the slimmable network's there.

    Statistics are those imposed on `net`, else those tracked at this width.

    Raises:
        ValueError: `net` has no statistics for this width.
    """
    plain = net.skeleton(width)
    index = net.index(width)
    for name, layer in net.named_modules():
        if isinstance(layer, (SlimmableConv2d, SlimmableLinear)):
            target = plain.get_submodule(name)
            assert isinstance(target, (nn.Conv2d, nn.Linear))
            factor = layer.weight.shape[1] / target.weight.shape[1] if layer.average else 1.0
            target.weight.copy_(_first(layer.weight, target.weight) * factor)
            if target.bias is not None and layer.bias is not None:
                target.bias.copy_(layer.bias)
        elif isinstance(layer, SlimmableBatchNorm2d):
            _copy_norm(layer, plain.get_submodule(name), None if index is None else min(index, layer.last_set))
    return plain.eval()


@torch.no_grad()
def absorbed(net: nn.Module) -> nn.Module:
    """A copy for inference whose convolutions have taken in the batch norm that comes next in a sequence (US-Nets,
    Eq. 7: it is a scale and a shift by then); others stay."""
    plain = copy.deepcopy(net).eval()
    for sequence in plain.modules():
        if type(sequence) is nn.Sequential:  # a subclass may run its layers in another order
            for number, (conv, norm) in enumerate(pairwise(sequence)):
                if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                    continue
                # Subclasses may do more: activate, or change their weights.
                if (type(conv), type(norm)) == (nn.Conv2d, nn.BatchNorm2d) and norm.running_mean is not None:
                    sequence[number], sequence[number + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return plain


def _first(source: Tensor, like: Tensor) -> Tensor:
    return source[tuple(slice(0, size) for size in like.shape)]


def _copy_norm(layer: SlimmableBatchNorm2d, target: nn.Module, index: int | None) -> None:
    assert isinstance(target, nn.BatchNorm2d)
    weight, bias = layer.affine_at(index, target.num_features)
    mean, var = layer.statistics(index, target.num_features)
    if mean is None or var is None:
        raise ValueError("Batch norm has no statistics for this width: calibrate it first.")
    assert target.running_mean is not None and target.running_var is not None
    for to, value in (
        (target.weight, weight),
        (target.bias, bias),
        (target.running_mean, mean),
        (target.running_var, var),
    ):
        to.copy_(value)
