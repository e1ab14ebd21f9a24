"""NVIDIA DALI decodes, from the top of a file only as far down as the window reaches.

On a CPU, DALI's own resize would cost as much as its decoding; torch's, on uint8, is several times as fast
and nearer to Pillow's. So DALI hands over windows, and this thread resizes them while DALI decodes the next
batch. On a GPU the whole work is DALI's.

Files are read and verified beforehand, in threads of our own. What DALI then still cannot decode, Pillow does: it has
said of every image whether it is sound. DALI keeps no state of its own here: no random numbers, no order, no reader.
A pipeline lives as long as one stream, or until it fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.data.faults import Faults
from pliant.data.index import Index
from pliant.data.loaders import Loaded, Request, blank, place
from pliant.data.loaders.reading import Read, read_ahead
from pliant.data.loaders.torchvision import TorchvisionLoader
from pliant.data.plan import Plan
from pliant.errors import UserError, optional_import

_MOST_FAILURES = 8  # batches in a row that DALI alone cannot decode, before it is no longer asked
_AHEAD = 2  # batches that DALI works on; more only helps where storage stutters

_Inputs = list[list[NDArray[np.uint8]] | NDArray[np.int32] | NDArray[np.float32]]


class DaliLoader:
    """Decodes the images of an index with DALI."""

    def __init__(self, index: Index, threads: int, device: torch.device, faults: Faults | None = None) -> None:
        """For the images of `index`.

        Args:
            device: where images are handed over; a GPU also decodes them.
            faults: told of broken images; default: any number of them is put up with.
        """
        self._dali = _import("nvidia.dali")
        self._fn = _import("nvidia.dali.fn")
        self._index = index
        self._threads = threads
        self._device = device
        self._gpu = device.type == "cuda"
        self._faults = faults or Faults(share=1.0)
        self._told = False
        self._copying: torch.cuda.Stream | None = None
        self._reference = TorchvisionLoader(index, threads, device, self._faults)

    def stream(self, requests: Iterable[Request]) -> Generator[Loaded, None, None]:
        """See `Loader.stream`."""
        coming = iter(requests)
        first = next(coming, None)
        if first is None:
            return
        with closing(read_ahead(self._index, self._faults, chain([first], coming), self._threads)) as reads:
            feeding = _Feeding(reads, self._gpu)
            while True:
                pipeline = self._pipeline(feeding, len(first.plan), first.plan.size)
                error = yield from self._run(pipeline, feeding)
                if error is None:
                    return
                # What DALI says names neither file nor image: the reference finds out, and has the last word.
                yield from self._by_reference(feeding, error)
                # DALI calls a pipeline that failed invalid: another goes on with what that one had been given.
                feeding.give_again()

    def _run(self, pipeline: Any, feeding: _Feeding) -> Generator[Loaded, None, RuntimeError | None]:
        """Yields what a pipeline gives, to its end or to the error that the oldest batch under way has met."""
        while True:
            try:
                (windows,) = pipeline.run()
            except StopIteration:
                if feeding.failure is not None:
                    raise feeding.failure from None
                return None
            except RuntimeError as error:
                if "decoders.image_slice" not in str(error) or not feeding.pending:
                    raise
                return error
            request, _ = feeding.pending.popleft()
            feeding.failures = 0
            yield request, self._images(windows, request.plan)

    def _by_reference(self, feeding: _Feeding, error: RuntimeError) -> Iterator[Loaded]:
        """The oldest batch under way, by Pillow, which is several times as slow.

        Raises:
            UserError: DALI failed at many in a row in which nothing is broken: out of memory, perhaps.
        """
        request, _ = feeding.pending.popleft()
        for mended, images in self._reference.stream([request]):
            if np.array_equal(mended.positions, request.positions):
                feeding.failures += 1
                self._tell(error, lasting=feeding.failures >= _MOST_FAILURES)
            yield mended, images

    def _tell(self, error: RuntimeError, *, lasting: bool) -> None:
        if lasting:
            raise UserError(
                f"DALI cannot decode {_MOST_FAILURES} batches in a row that Pillow can ({_telling(error)}): write "
                "--data.loader torchvision."
            )
        if not self._told:
            self._told = True
            self._faults.tell(f"DALI cannot decode a batch that Pillow can, which stands in: {_telling(error)}.")

    def _pipeline(self, source: _Feeding, batch: int, size: int) -> Any:
        fn, types, gpu = self._fn, self._dali.types, self._gpu
        inputs = [types.UINT8, types.INT32, types.INT32, *([types.FLOAT, types.INT32] if gpu else [])]
        pipeline = self._dali.Pipeline(
            batch_size=batch,
            num_threads=self._threads,
            device_id=torch.empty(0, device=self._device).get_device() if gpu else None,
            prefetch_queue_depth=_AHEAD,
        )
        with pipeline:
            encoded, corner, extent, *placing = fn.external_source(
                source=source, num_outputs=len(inputs), batch=True, ndim=[1] * len(inputs), dtype=inputs, no_copy=True
            )
            images = fn.decoders.image_slice(
                encoded,
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
            return self._own_copy(windows.as_tensor()).permute(0, 3, 1, 2)
        images = blank(plan, pin=False)
        for entry in range(len(plan)):
            window = torch.from_numpy(np.asarray(windows[entry])).permute(2, 0, 1)
            place(window, plan, entry, images[entry])
        return images

    def _own_copy(self, windows: Any) -> Tensor:
        """DALI's memory is DALI's again as soon as torch lets go of it, whatever torch has only queued that reads it. A
        stream of its own copies it while the network runs, and this thread waits for that alone."""
        if self._copying is None:
            self._copying = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._copying):
            own = torch.utils.dlpack.from_dlpack(windows).clone()
        self._copying.synchronize()
        own.record_stream(torch.cuda.current_stream(self._device))  # torch's memory, used there from now on
        return own


class _Feeding:
    """Feeds a pipeline, which asks ahead of what it delivers, and notes what was asked for."""

    def __init__(self, reads: Iterator[Read], placing: bool) -> None:
        """`placing`: the pipeline also resizes and places windows."""
        self.pending: deque[Read] = deque()
        """What the pipeline was given and has not delivered."""
        self.failures = 0
        """Batches in a row that a pipeline failed at, though no image of them is broken."""
        self.failure: BaseException | None = None
        """What ended the reads, to be raised once all before it is delivered: DALI would raise it too early."""
        self._reads = reads
        self._placing = placing
        # DALI reads inputs where they lie, up to as many batches later as it works ahead: copies cost a percent.
        self._lent: deque[_Inputs] = deque(maxlen=3 * _AHEAD)

    def give_again(self) -> None:
        """Begin another pipeline with what the last one was given and did not deliver."""
        self._reads = chain(list(self.pending), self._reads)
        self.pending.clear()

    def __call__(self) -> _Inputs:
        try:
            read = next(self._reads)
        except StopIteration:  # ends the pipeline, after the batches under way
            raise
        except BaseException as error:
            self.failure = error
            raise StopIteration from None
        self.pending.append(read)
        request, contents = read
        plan = request.plan
        encoded = [np.frombuffer(content, np.uint8) for content in contents]
        corner, extent = np.ascontiguousarray(plan.window[:, :2]), np.ascontiguousarray(plan.window[:, 2:])
        # fn.resize reads sizes as floats.
        placing: _Inputs = [plan.resized.astype(np.float32), plan.offset] if self._placing else []
        self._lent.append([encoded, corner, extent, *placing])
        return self._lent[-1]


def available() -> bool:
    """Whether DALI is installed."""
    try:
        _import("nvidia.dali")
    except UserError:
        return False
    return True


def _import(module: str) -> Any:
    extra = "dali-cuda13" if (torch.version.cuda or "").startswith("13") else "dali-cuda12"
    return optional_import(module, extra=extra, purpose="The loader dali")


def _telling(error: RuntimeError) -> str:
    """The line of DALI's report that says what failed, without the rest."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "ailed" in line or "not valid" in line or "Could not" in line]
    return " ".join((telling or lines)[0].split()).rstrip(".")
