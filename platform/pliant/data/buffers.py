"""Memory for batches that is used again.

A large block of fresh memory costs a CPU a page fault for every 4 kB of it: for 64 images of 224 px in float32 that is
as long as cutting and resizing them.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class _Lease(np.ndarray[tuple[int, ...], np.dtype[np.float32]]):
    """A view of a block, held by the tensor that was handed out; unlike a plain array it can be watched."""


class Buffers:
    """Hands out float32 tensors on the CPU; the memory of one that nobody holds any more serves the next."""

    def __init__(self) -> None:
        self._free: dict[int, list[NDArray[np.float32]]] = {}

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised, of this shape. Any view of it, and any graph that saved it, keeps its memory."""
        size = math.prod(shape)
        waiting = self._free.setdefault(size, [])
        try:
            block = waiting.pop()
        except IndexError:
            block = torch.empty(size).numpy()  # NumPy asks for huge pages, which may take longer to come by
        lease = block.view(_Lease)
        weakref.finalize(lease, waiting.append, block).atexit = False
        return torch.from_numpy(lease).view(shape)
