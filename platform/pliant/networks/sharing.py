"""A tensor that several passes start from, computed once though each pass frees its own graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Shared:
    """Hands out the first channels of a tensor to one pass after another.

    All but the last pass get a leaf, whose gradient waits; the last gets the tensor's own channels, and as its
    backward comes through, the waiting gradients join. So the layers before the tensor run forward and backward once.
    The gradients carry whatever factor the losses had (a gradient scaler's, a share of the batch), the same for all.

    Shapes: the tensor is (B, C, H, W), in channels-last layout, as are the gradients.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._leaves: list[Tensor] = []

    def borrow(self, channels: int) -> Tensor:
        """A leaf of the first `channels`, for any pass but the last."""
        leaf = _first(self._tensor.detach(), channels).requires_grad_()
        self._leaves.append(leaf)
        return leaf

    def settle(self, channels: int) -> Tensor:
        """The first `channels`, for the last pass; its backward goes on into what the tensor came from."""
        answer: Tensor = _Settled.apply(self._tensor, channels, self._leaves)  # type: ignore[no-untyped-call]
        return answer


def _first(tensor: Tensor, channels: int) -> Tensor:
    return tensor[:, :channels].contiguous(memory_format=torch.channels_last)


class _Settled(torch.autograd.Function):
    """A slice whose gradient is the sum over all passes, in the tensor's own layout.

    The gradient of an ordinary slice is zeros in the default layout, which batch norm's backward is slow on.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, channels: int, leaves: list[Tensor]) -> Tensor:
        ctx.shape, ctx.leaves = tensor.shape, leaves
        part = _first(tensor, channels)
        return part.clone() if part.data_ptr() == tensor.data_ptr() else part

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        parts = [gradient, *(leaf.grad for leaf in ctx.leaves if leaf.grad is not None)]
        widest = max(parts, key=lambda part: part.shape[1])
        if widest.shape == ctx.shape:
            total = widest.clone(memory_format=torch.channels_last)
        else:
            total = widest.new_zeros(ctx.shape).to(memory_format=torch.channels_last)
            total[:, : widest.shape[1]] = widest
        for part in parts:
            if part is not widest:
                total[:, : part.shape[1]] += part
        return total, None, None
