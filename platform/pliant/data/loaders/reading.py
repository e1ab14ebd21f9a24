"""The stored bytes of batches, read and verified in threads, ahead of what decodes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from pliant.data.decoding import Faulty
from pliant.data.faults import Faults
from pliant.data.index import Index
from pliant.data.loaders import Request
from pliant.data.loaders.mending import mend

_AHEAD = 2  # batches that are read while an earlier one is decoded
_PIECES = 4  # of a batch, each read by one thread in one go: a task for each image would cost as much as reading it

Read = tuple[Request, list[bytes]]
"""A request and the stored bytes of its images."""


def read_ahead(index: Index, faults: Faults, requests: Iterable[Request], threads: int) -> Generator[Read, None, None]:
    """The requests, mended where images cannot be read, and the stored bytes of their images.

    A request all of whose images are left out is passed over.

    Raises:
        UserError: too many images are broken.
    """
    started: deque[tuple[Request, list[Future[list[bytes | Faulty]]]]] = deque()

    def finished() -> Read:
        request, pieces = started.popleft()
        got = [one for piece in pieces for one in piece.result()]
        return mend(request, got, index=index, faults=faults, fetch=index.encoded)

    pool = ThreadPoolExecutor(max(threads, _PIECES), "pliant-read")
    try:
        for request in requests:
            positions = request.positions.tolist()
            size = -(-len(positions) // _PIECES)
            pieces = [positions[first : first + size] for first in range(0, len(positions), size)]
            started.append((request, [pool.submit(_fetch, index, piece) for piece in pieces]))
            if len(started) > _AHEAD:
                one = finished()
                if one[1]:
                    yield one
        while started:
            one = finished()
            if one[1]:
                yield one
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch(index: Index, positions: list[int]) -> list[bytes | Faulty]:
    return [_fetched(index, position) for position in positions]


def _fetched(index: Index, position: int) -> bytes | Faulty:
    """The stored bytes of an image, or why there are none."""
    try:
        return index.encoded(position)
    except Faulty as fault:
        return fault
