"""Small images that stay in memory: a batch is one gather, without any decoding.

All images lie padded, and a view shows every window of every image without a copy: indexing it with (image,
top, left) copies B windows at once, each row of it in one piece.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

import numpy as np
import torch
from torch import Tensor

from pliant.data.index import Pixels
from pliant.data.loaders import Loaded, Request
from pliant.data.plan import PAD


class ResidentLoader:
    """Gathers windows from images on the device."""

    def __init__(self, pixels: Pixels, device: torch.device) -> None:
        """Takes 1.6 times the images' own memory, on `device`."""
        images, height, width, channels = pixels.images.shape
        padded = np.zeros((images, height + 2 * PAD, width + 2 * PAD, channels), np.uint8)
        padded[:, PAD:-PAD, PAD:-PAD] = pixels.images
        image, row, column, value = padded.strides
        shape = (images, 2 * PAD + 1, 2 * PAD + 1, height, width * channels)
        strides = (image, row, column, row, value)
        self._shape = (height, width, channels)
        # NumPy copies a row of a window in one piece, torch value by value, six times as slowly on a CPU.
        self._windows: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | Tensor = (
            np.lib.stride_tricks.as_strided(padded, shape, strides, writeable=False)
            if device.type == "cpu"
            else torch.from_numpy(padded).to(device).as_strided(shape, strides)
        )

    def stream(self, requests: Iterable[Request]) -> Generator[Loaded, None, None]:
        """See `Loader.stream`."""
        for request in requests:
            corner = request.plan.offset.astype(np.int64) + PAD
            yield request, self._gather(request.positions, corner[:, 0], corner[:, 1])

    def _gather(self, *place: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        windows = self._windows
        if isinstance(windows, Tensor):
            device = windows.device
            rows = windows[tuple(torch.from_numpy(part).to(device, non_blocking=True) for part in place)]
        else:
            rows = torch.from_numpy(windows[place])
        return rows.view(-1, *self._shape).permute(0, 3, 1, 2)
