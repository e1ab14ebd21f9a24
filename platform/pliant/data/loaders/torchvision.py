"""The reference: Pillow decodes, torchvision resizes, in several threads. Runs wherever torch does."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pliant.data.index import Index, unreadable
from pliant.data.loaders import Loaded, Request, blank, cut
from pliant.data.plan import Plan
from pliant.data.prefetch import run_in_one_thread
from pliant.torchvision_cpu import make_importable

_AHEAD = 2  # requests whose images the threads may be working on, so that none of them idles at a batch's end


class TorchvisionLoader:
    """Decodes the files of an index in a pool of threads."""

    def __init__(self, index: Index, threads: int, device: torch.device) -> None:
        """`device`: where the images will go; for a GPU they are handed over in pinned memory."""
        make_importable()
        self._resize: Any = import_module("torchvision.transforms.v2.functional").resize
        self._index = index
        self._threads = threads
        self._pin = device.type == "cuda"

    def stream(self, requests: Iterable[Request]) -> Generator[Loaded, None, None]:
        """See `Loader.stream`."""
        pool = ThreadPoolExecutor(self._threads, "pliant-decode", initializer=run_in_one_thread)
        started: deque[tuple[Request, Tensor, list[Future[None]]]] = deque()
        try:
            for request in requests:
                images = blank(request.plan, self._pin)
                work = partial(self._load, request, images)
                started.append((request, images, [pool.submit(work, entry) for entry in range(len(request.plan))]))
                if len(started) == _AHEAD:
                    yield _finished(*started.popleft())
            while started:
                yield _finished(*started.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _load(self, request: Request, images: Tensor, entry: int) -> None:
        plan = request.plan
        window = _window(self._index.path(int(request.positions[entry])), plan, entry)
        resized = self._resize(window, plan.resized[entry].tolist(), antialias=True)
        cut(resized, plan, entry, images[entry])


def _finished(request: Request, images: Tensor, work: list[Future[None]]) -> Loaded:
    for image in work:
        image.result()
    return request, images


def _window(path: str, plan: Plan, entry: int) -> Tensor:
    """uint8, (3, height, width): the window of entry `entry`."""
    top, left, height, width = plan.window[entry].tolist()
    try:
        with Image.open(path) as image:
            whole = image.convert("RGB")
    except Exception as error:  # a damaged file may raise anything
        raise unreadable(path, error) from None
    if whole.height < top + height or whole.width < left + width:
        raise unreadable(path, ValueError("it has shrunk since the folder was scanned"))
    # A copy, as torch wants memory that it may write to.
    return torch.from_numpy(np.array(whole.crop((left, top, left + width, top + height)))).permute(2, 0, 1)
