"""Opening every image of a listing once, in several threads: size, checksum, and whether it decodes.

Pillow and zlib leave Python's lock while they work: two threads do 95 % of what two processes do, and need neither a
start of their own nor a `__main__` that may be imported twice.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import repeat

import numpy as np
from PIL import Image

from pliant.cores import usable_cores
from pliant.data.decoding import Faulty, check, reason, size_of
from pliant.data.index.split import patiently, read
from pliant.data.index.table import Listing, Table
from pliant.errors import UserError, printable

_log = logging.getLogger(__name__)

READERS = max(8, usable_cores())  # threads: on slow storage they wait more than they compute
_CHUNK = 256  # images opened by one task of a thread
_HEADER = 1 << 16  # bytes of an image in a shard that are read for its size
_QUIET_S = 5.0  # a scan that takes less says nothing
_TELL_S = 10.0  # between lines of progress
_ITS_OWN = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.ENXIO),
)
"""Why a file itself cannot be read: a link to nowhere, or not ours to read. All else may pass, or hit any file."""
_REASONS = 1000  # reasons kept: more images than this are not looked through one by one


def examine(listing: Listing, *, strict: bool) -> Table:
    """Open all images of a listing; one that cannot be used is marked as broken, not raised.

    What storage or memory fails in is said of no image, as it would be kept for good, and by this rank alone.

    Args:
        strict: read, decode and checksum every byte; else read headers alone.

    Raises:
        UserError: storage or memory fails.
    """
    table = Table(
        listing=listing,
        strict=strict,
        size=np.ones((len(listing), 2), np.int32),
        crc=np.zeros(len(listing), np.uint32),
        broken=np.zeros(len(listing), np.bool_),
        reasons=(),
    )
    firsts = range(0, len(listing), _CHUNK)
    reasons: list[str] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(READERS, "pliant-index") as readers:
        # Pillow warns of images above 89 megapixels; above 179 it refuses them.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        progress = _Progress(len(listing), str(listing.folder))
        try:
            for number, found in enumerate(readers.map(_examine_chunk, repeat(table), firsts), 1):
                reasons += found[: _REASONS - len(reasons)]
                progress.tell(min(number * _CHUNK, len(listing)))
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)  # a million others do not matter now
            raise
    return replace(table, reasons=tuple(reasons))


def _examine_chunk(table: Table, first: int) -> list[str]:
    """Fills the rows of a chunk in; the reasons of those that are broken, in their order."""
    rows = range(first, min(first + _CHUNK, len(table.listing)))
    return [found for row in rows if (found := _examine_row(table, row)) is not None]


def _examine_row(table: Table, row: int) -> str | None:
    look = _decode if table.strict else _glance
    file = table.listing.file(row)
    try:
        if table.listing.whole:
            table.listing.length[row] = patiently(lambda: os.stat(file)).st_size
        table.size[row], table.crc[row] = look(table.listing, row)
    except Faulty as fault:
        table.broken[row] = True
        return str(fault)
    except MemoryError:
        raise UserError(
            f"There is too little memory to index {printable(file)}: start where there is more, or replace or remove "
            "the image."
        ) from None
    except OSError as error:
        if error.errno not in _ITS_OWN:
            raise UserError(
                f"{printable(file)} could not be read while it was indexed ({reason(error)}), which may be no fault of "
                "its own: start again, and replace or remove it if that does not help."
            ) from None
        table.broken[row] = True
        return reason(error)
    return None


def _decode(listing: Listing, row: int) -> tuple[tuple[int, int], int]:
    length = int(listing.length[row])
    content = read(listing.file(row), int(listing.offset[row]), length)
    if len(content) != length:
        raise Faulty(f"{len(content)} bytes could be read, not {length}")
    return check(content), zlib.crc32(content)


def _glance(listing: Listing, row: int) -> tuple[tuple[int, int], int]:
    if listing.whole:
        return patiently(lambda: size_of(listing.file(row))), 0
    file, offset, length = listing.file(row), int(listing.offset[row]), int(listing.length[row])
    try:
        return size_of(io.BytesIO(read(file, offset, min(length, _HEADER)))), 0
    except Faulty:  # a header may be longer: some carry a thumbnail
        return size_of(io.BytesIO(read(file, offset, length))), 0


class _Progress:
    """Says how far a scan is, now and then."""

    def __init__(self, images: int, what: str) -> None:
        self._images = images
        self._what = what
        self._began = time.monotonic()
        self._next = self._began + _QUIET_S

    def tell(self, done: int) -> None:
        """`done` images were opened."""
        now = time.monotonic()
        if now < self._next and not (done == self._images and self._next > self._began + _QUIET_S):
            return
        self._next = now + _TELL_S
        rate = done / max(now - self._began, 1e-9)
        left = (self._images - done) / rate
        _log.info(
            "Indexing %s: %d of %d images, %.0f a second, %d:%02d left",
            self._what,
            done,
            self._images,
            rate,
            *divmod(round(left), 60),
        )
