"""NVIDIA DALI decodes, from the top of a file only as far down as the window reaches.

On a CPU, DALI's own resize would cost as much as its decoding; torch's, on uint8, is several times as fast
and nearer to Pillow's. So DALI hands over windows, and this thread resizes them while DALI decodes the next
batch. On a GPU the whole work is DALI's.

DALI keeps no state of its own here: no random numbers, no order, no reader. A pipeline lives as long as one
stream.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.data.index import Index, unreadable
from pliant.data.loaders import Loaded, Request, blank, place
from pliant.data.plan import Plan
from pliant.errors import UserError, optional_import

_AHEAD = 2  # batches that DALI works on; more only helps where storage stutters

_Inputs = list[list[NDArray[np.uint8]] | NDArray[np.int32] | NDArray[np.float32]]


class DaliLoader:
    """Decodes the files of an index with DALI."""

    def __init__(self, index: Index, threads: int, device: torch.device) -> None:
        """`device`: where images are handed over; a GPU also decodes them."""
        self._dali = _import("nvidia.dali")
        self._fn = _import("nvidia.dali.fn")
        self._index = index
        self._threads = threads
        self._device = device
        self._gpu = device.type == "cuda"

    def stream(self, requests: Iterable[Request]) -> Generator[Loaded, None, None]:
        """See `Loader.stream`."""
        coming = iter(requests)
        first = next(coming, None)
        if first is None:
            return
        pending: deque[Request] = deque()
        pipeline = self._pipeline(self._source(chain([first], coming), pending), len(first.plan), first.plan.size)
        while True:
            try:
                (windows,) = pipeline.run()
            except StopIteration:
                return
            except RuntimeError as error:
                raise self._culprit(pending[0], error) from None
            request = pending.popleft()
            yield request, self._images(windows, request.plan)

    def _source(self, requests: Iterator[Request], pending: deque[Request]) -> Callable[[], _Inputs]:
        """Feeds the pipeline, which asks ahead of what it delivers, and notes what was asked for."""

        def source() -> _Inputs:
            request = next(requests)  # its StopIteration ends the pipeline, after the batches under way
            pending.append(request)
            plan = request.plan
            paths = [
                np.frombuffer(os.fsencode(self._index.path(position)), np.uint8)
                for position in request.positions.tolist()
            ]
            corner, extent = np.ascontiguousarray(plan.window[:, :2]), np.ascontiguousarray(plan.window[:, 2:])
            # fn.resize reads sizes as floats.
            placing: _Inputs = [plan.resized.astype(np.float32), plan.offset] if self._gpu else []
            return [paths, corner, extent, *placing]

        return source

    def _pipeline(self, source: Callable[[], _Inputs], batch: int, size: int) -> Any:
        fn, types, gpu = self._fn, self._dali.types, self._gpu
        inputs = [types.UINT8, types.INT32, types.INT32, *([types.FLOAT, types.INT32] if gpu else [])]
        pipeline = self._dali.Pipeline(
            batch_size=batch,
            num_threads=self._threads,
            device_id=torch.empty(0, device=self._device).get_device() if gpu else None,
            prefetch_queue_depth=_AHEAD,
        )
        with pipeline:
            paths, corner, extent, *placing = fn.external_source(
                source=source, num_outputs=len(inputs), batch=True, ndim=[1] * len(inputs), dtype=inputs
            )
            images = fn.decoders.image_slice(
                fn.io.file.read(paths),
                start=corner,
                shape=extent,
                axis_names="HW",
                device="mixed" if gpu else "cpu",
                adjust_orientation=False,  # windows are counted in pixels as stored
            )
            if gpu:
                resized, offset = placing
                images = fn.resize(images, size=resized, interp_type=types.INTERP_LINEAR, antialias=True)
                images = fn.slice(
                    images,
                    start=offset,
                    shape=[size, size],
                    axes=[0, 1],
                    out_of_bounds_policy="pad",
                    fill_values=0,
                )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _images(self, windows: Any, plan: Plan) -> Tensor:
        if self._gpu:
            return torch.utils.dlpack.from_dlpack(windows.as_tensor()).permute(0, 3, 1, 2)
        images = blank(plan, pin=False)
        for entry in range(len(plan)):
            window = torch.from_numpy(np.asarray(windows[entry])).permute(2, 0, 1)
            place(window, plan, entry, images[entry])
        return images

    def _culprit(self, request: Request, error: RuntimeError) -> Exception:
        """The sentence that names the file: DALI says at most which image of the batch it was."""
        for entry in range(len(request.plan)):
            one = slice(entry, entry + 1)
            part = Request(request.positions[one], request.plan.part(one))
            alone = self._pipeline(self._source(iter([part]), deque()), 1, part.plan.size)
            try:
                alone.run()
            except RuntimeError as reason:
                return unreadable(self._index.path(int(part.positions[0])), _telling(reason))
        return error


def available() -> bool:
    """Whether DALI is installed."""
    try:
        _import("nvidia.dali")
    except UserError:
        return False
    return True


def _import(module: str) -> Any:
    return optional_import(module, extra="dali-cuda12", purpose="The loader dali")


def _telling(error: RuntimeError) -> RuntimeError:
    """The line of DALI's report that says what failed, without the rest."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "ailed" in line or "not valid" in line or "Could not" in line]
    return RuntimeError(f"DALI: {(telling or lines)[0]}")
