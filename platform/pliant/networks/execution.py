"""Ways to carry out which images run a block: the same logits, unlike times.

`gate` is (B,), how far the block is open for each image. Where it is closed nothing is added. What is left then is the
shortcut: through the block's ReLU (`inside`, as URNet's Y = X + gate F before its ReLU), or as it is (`around`,
SkipNet's Eq. 1, and the code of BlockDrop's authors). The two differ only where a shortcut has negative values, at a
projection.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pliant.networks.resnet import Block, Bottleneck, ResidualNet, Run

Execution = Literal["masked", "grouped"]
Closed = Literal["inside", "around"]


def runner(execution: Execution, closed: Closed) -> Run:
    """masked: every image runs every block, and is blended. grouped: a block runs on the images that keep it."""
    run: Callable[[Block, Tensor, Tensor | None, Closed], Tensor] = masked if execution == "masked" else grouped
    return lambda block, x, gate: run(block, x, gate, closed)


def masked(block: Block, x: Tensor, gate: Tensor | None, closed: Closed) -> Tensor:
    """For training: gradients reach gates and skipped blocks, and batch norm sees all images."""
    if gate is None:
        return block(x)  # type: ignore[no-any-return]
    gate = gate.to(x.dtype)[:, None, None, None]
    shortcut = block.shortcut(x)
    if closed == "inside":
        return F.relu(shortcut + gate * block.residual(x))
    return gate * F.relu(shortcut + block.residual(x)) + (1 - gate) * shortcut


def grouped(block: Block, x: Tensor, gate: Tensor | None, closed: Closed) -> Tensor:
    """For inference: a closed block costs nothing. May write into `x`."""
    if gate is None:
        return block(x)  # type: ignore[no-any-return]
    kept = (gate > 0.5).nonzero()[:, 0]
    if len(kept) == len(x):
        return block(x)  # type: ignore[no-any-return]
    shortcut = block.shortcut(x)
    # A shortcut without a projection has no negative values: its ReLU would change nothing.
    left = F.relu(shortcut) if closed == "inside" and isinstance(block.downsample, nn.Sequential) else shortcut
    if len(kept) == 0:
        return left
    rows = _rows(x, kept)
    part = block.residual(rows).add_(rows if shortcut is x else _rows(shortcut, kept))
    _put(left, kept, F.relu(part, inplace=True))
    return left


def _rows(x: Tensor, kept: Tensor) -> Tensor:
    """Some images, in channels-last memory: whole rows are copied."""
    return x.permute(0, 2, 3, 1).index_select(0, kept).permute(0, 3, 1, 2)


def _put(x: Tensor, kept: Tensor, rows: Tensor) -> None:
    x.permute(0, 2, 3, 1).index_copy_(0, kept, rows.permute(0, 2, 3, 1))


@torch.no_grad()
def folded(net: ResidualNet) -> ResidualNet:
    """A copy for inference, batch norm folded into the convolutions."""
    plain = copy.deepcopy(net).eval()
    plain.conv1, plain.bn1 = fuse_conv_bn_eval(plain.conv1, plain.bn1), nn.Identity()  # type: ignore[assignment]
    for block in plain.blocks():
        for index in (1, 2, 3) if isinstance(block, Bottleneck) else (1, 2):
            conv, norm = getattr(block, f"conv{index}"), getattr(block, f"bn{index}")
            setattr(block, f"conv{index}", fuse_conv_bn_eval(conv, norm))
            setattr(block, f"bn{index}", nn.Identity())
        if isinstance(block.downsample, nn.Sequential):
            conv, norm = block.downsample[0], block.downsample[1]
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            block.downsample = nn.Sequential(fuse_conv_bn_eval(conv, norm), nn.Identity())
    return plain
