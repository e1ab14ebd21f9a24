"""The reference: Pillow decodes, torchvision resizes, in several threads. Runs wherever torch does."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pliant.data.decoding import Faulty, decoded
from pliant.data.faults import Faults
from pliant.data.index import Index
from pliant.data.loaders import Loaded, Request, blank, cut
from pliant.data.loaders.mending import mend
from pliant.data.plan import Plan
from pliant.data.prefetch import run_in_one_thread
from pliant.torchvision_cpu import make_importable

_AHEAD = 2  # requests whose images the threads may be working on, so that none of them idles at a batch's end


class TorchvisionLoader:
    """Decodes the images of an index in a pool of threads."""

    def __init__(self, index: Index, threads: int, device: torch.device, faults: Faults | None = None) -> None:
        """For the images of `index`.

        Args:
            device: where the images will go; for a GPU they are handed over in pinned memory.
            faults: told of broken images; default: any number of them is put up with.
        """
        make_importable()
        self._resize: Any = import_module("torchvision.transforms.v2.functional").resize
        self._index = index
        self._threads = threads
        self._pin = device.type == "cuda"
        self._faults = faults or Faults(share=1.0)

    def stream(self, requests: Iterable[Request]) -> Generator[Loaded, None, None]:
        """See `Loader.stream`."""
        pool = ThreadPoolExecutor(self._threads, "pliant-decode", initializer=run_in_one_thread)
        started: deque[tuple[Request, Tensor, list[Future[Faulty | None]]]] = deque()
        try:
            for request in requests:
                images = blank(request.plan, self._pin)
                work = partial(self._load, request, images)
                started.append((request, images, [pool.submit(work, entry) for entry in range(len(request.plan))]))
                if len(started) == _AHEAD:
                    yield from self._finished(*started.popleft())
            while started:
                yield from self._finished(*started.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, request: Request, images: Tensor, entry: int) -> Faulty | None:
        """Puts an image in its place; why not, where it is broken."""
        try:
            self._put(self._decoded(int(request.positions[entry])), request.plan, entry, images[entry])
        except Faulty as fault:
            return fault
        return None

    def _decoded(self, position: int) -> Image.Image:
        image = decoded(self._index.encoded(position))
        if (image.height, image.width) != tuple(self._index.sizes[position].tolist()):  # without checksums it may be
            raise Faulty(f"it has changed since it was indexed: {image.width} x {image.height} pixels now")
        return image

    def _put(self, image: Image.Image, plan: Plan, entry: int, target: Tensor) -> None:
        resized = self._resize(_window(image, plan, entry), plan.resized[entry].tolist(), antialias=True)
        cut(resized, plan, entry, target)

    def _finished(self, request: Request, images: Tensor, work: list[Future[Faulty | None]]) -> Iterator[Loaded]:
        # None stands for an image that is in its place.
        got: list[Image.Image | Faulty | None] = [one.result() for one in work]
        mended, whole = mend(request, got, index=self._index, faults=self._faults, fetch=self._decoded)
        if len(mended.positions) < len(got):
            kept = torch.tensor([entry for entry, one in enumerate(got) if one is None], dtype=torch.int64)
            images = images.permute(0, 2, 3, 1)[kept].permute(0, 3, 1, 2)
        for entry, image in enumerate(whole):
            if image is not None:
                self._put(image, mended.plan, entry, images[entry])
        if whole:
            yield mended, images


def _window(image: Image.Image, plan: Plan, entry: int) -> Tensor:
    """uint8, (3, height, width): the window of entry `entry`."""
    top, left, height, width = plan.window[entry].tolist()
    # A copy, as torch wants memory that it may write to.
    return torch.from_numpy(np.array(image.crop((left, top, left + width, top + height)))).permute(2, 0, 1)
