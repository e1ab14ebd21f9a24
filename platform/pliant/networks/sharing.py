"""A tensor that several passes start from, computed once though each pass frees its own graph."""

from __future__ import annotations

import torch
from torch import Tensor


class Shared:
    """Hands out the first channels of a tensor to one pass after another.

    All but the last pass get a leaf, whose gradient waits; the last gets the tensor itself, and as its backward
    comes through, the waiting gradients join. So the layers before the tensor run forward and backward once. The
    gradients carry whatever factor the losses had (a gradient scaler's, a share of the batch), the same for all.

    Shapes: the tensor is (B, C, H, W).
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._leaves: list[Tensor] = []

    def borrow(self, channels: int) -> Tensor:
        """A leaf of the first `channels`, for any pass but the last."""
        leaf = self._tensor.detach()[:, :channels].contiguous(memory_format=torch.channels_last).requires_grad_()
        self._leaves.append(leaf)
        return leaf

    def settle(self) -> Tensor:
        """The tensor itself, for the last pass, which takes its first channels."""
        self._tensor.register_hook(self._join)
        return self._tensor

    def _join(self, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        for leaf in self._leaves:
            if leaf.grad is not None:
                total[:, : leaf.shape[1]] += leaf.grad
        return total
