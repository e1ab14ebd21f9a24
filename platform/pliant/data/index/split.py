"""The images of one split: in files, or in memory.

Shapes: N images of the split.
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pliant.data.decoding import Faulty, reason
from pliant.data.index.table import Table
from pliant.errors import printable

T = TypeVar("T")

_LOOKED_AT = 2000  # images in memory whose pixels tell them from others: all of SVHN's would take a second

_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_STUMBLES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)  # of network storage, mostly
_PAUSES_S = (0.1, 1.0, 3.0)


@dataclass(frozen=True)
class Fingerprint:
    """What tells one split from another, in a few numbers. Checksums are crc32; the images found broken count as
    empty in that of the contents."""

    images: int
    labels: int
    """Checksum of the labels, in the order of the positions."""
    strict: bool
    """`broken` and `contents` are of images that were read whole, not of their headers."""
    broken: int
    """Checksum of which images were found broken."""
    contents: int
    """Checksum of the images' sizes and checksums, or of the pixels of some."""

    def same_positions(self, other: Fingerprint) -> bool:
        """Whether there are as many images, of the same classes in the same order."""
        return (self.images, self.labels) == (other.images, other.labels)

    def same_contents(self, other: Fingerprint) -> bool:
        """Whether they are also the same images, as far as both sides looked, unless some broke or were mended."""
        comparable = (self.strict, self.broken) == (other.strict, other.broken)
        return self.same_positions(other) and (not comparable or self.contents == other.contents)


@dataclass(frozen=True, eq=False)
class Index:
    """The image files of one split, or the images in its shards. Copies nothing of the table but small columns."""

    table: Table
    """Of all images of the folder, shared by its splits."""
    rows: NDArray[np.int32] | None
    """(N,), where each image stands in the table; None: as they come."""
    labels: NDArray[np.int32]
    """(N,), index into `classes`."""
    sizes: NDArray[np.int32]
    """(N, 2), height and width in pixels as stored in the file: an EXIF rotation is not applied."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, position: int) -> str:
        """The file of the image at `position` in [0, N); of an image in a shard, SHARD:MEMBER. To open, not to show:
        a name that is no UTF-8 carries surrogates."""
        row, listing = self._row(position), self.table.listing
        return listing.file(row) if listing.whole else f"{listing.file(row)}:{listing.name(row)}"

    def shown(self, position: int) -> str:
        """The `path` for a person."""
        return printable(self.path(position))

    def encoded(self, position: int) -> bytes:
        """The stored bytes of the image at `position`, the same as when it was indexed. Safe in threads.

        Raises:
            Faulty: it was broken then, is gone, cannot be read or has changed.
            OSError: this process or machine is short of something, and no image can be read.
        """
        row, table = self._row(position), self.table
        if table.broken[row]:
            raise Faulty(self.reason(position))
        length = int(table.listing.length[row])
        try:
            # A file is asked for a byte more, which tells whether it has grown.
            content = read(table.listing.file(row), int(table.listing.offset[row]), length + table.listing.whole)
        except OSError as error:
            raise fault_of(error) from None
        if len(content) != length:
            more = "more than " if len(content) > length else ""
            found = length if more else len(content)
            raise Faulty(f"it has changed since it was indexed: {more}{found} bytes, not {length}")
        if table.strict and zlib.crc32(content) != table.crc[row]:
            raise Faulty(f"it has changed since it was indexed: {length} bytes, but others")
        return content

    @cached_property
    def broken(self) -> NDArray[np.int64]:
        """Positions of the images that were found broken when they were indexed, sorted."""
        marks = self.table.broken if self.rows is None else self.table.broken[self.rows]
        return np.flatnonzero(marks)

    def reason(self, position: int) -> str:
        """Why a broken image is."""
        place = int(np.count_nonzero(self.table.broken[: self._row(position)]))
        return self.table.reasons[place] if place < len(self.table.reasons) else "it could not be decoded"

    def replaced(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions, with the first stand-in for each that is broken. Pure."""
        marked = np.flatnonzero(np.isin(positions, self.broken)) if len(self.broken) else ()
        if not len(marked):
            return positions
        sound = positions.copy()
        for place in marked:
            sound[place] = next(self.stand_ins(int(positions[place])), positions[place])
        return sound

    def stand_ins(self, position: int) -> Iterator[int]:
        """The other sound images of the same class: those after `position` in order, then from the first on. Pure."""
        alike = np.flatnonzero(self.labels == self.labels[position])
        alike = alike[~np.isin(alike, self.broken)]
        after = int(np.searchsorted(alike, position))
        for other in np.roll(alike, -after).tolist():
            if other != position:
                yield other

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Equal for equal images, wherever they lie."""
        crc = self.table.crc if self.rows is None else self.table.crc[self.rows]
        return Fingerprint(
            images=len(self),
            labels=_crc(self.labels),
            strict=self.table.strict,
            broken=_crc(self.broken),
            contents=_crc(self.sizes, crc),
        )

    def subset(self, positions: NDArray[np.int64]) -> Index:
        """The images at `positions`, in that order, numbered anew from 0."""
        rows = positions.astype(np.int32) if self.rows is None else self.rows[positions]
        return Index(self.table, rows, self.labels[positions], self.sizes[positions], self.classes)

    def _row(self, position: int) -> int:
        return int(position if self.rows is None else self.rows[position])


@dataclass(frozen=True, eq=False)
class Pixels:
    """The images of one split, held in memory; all of one size."""

    images: NDArray[np.uint8]
    """(N, height, width, 3)."""
    labels: NDArray[np.int32]
    """(N,), index into `classes`."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Equal for equal images, wherever they lie; of the pixels only some images' are looked at."""
        some = self.images[:: -(-len(self) // _LOOKED_AT)] if len(self) else self.images
        return Fingerprint(len(self), _crc(self.labels), strict=True, broken=0, contents=_crc(some))

    def subset(self, positions: NDArray[np.int64]) -> Pixels:
        """The images at `positions`, in that order, numbered anew from 0."""
        return replace(self, images=self.images[positions], labels=self.labels[positions])


Split = Index | Pixels


def _crc(*columns: NDArray[Any]) -> int:
    found = 0
    for column in columns:
        found = zlib.crc32(np.ascontiguousarray(column).data, found)
    return found


def fault_of(error: OSError) -> Faulty:
    """That a file cannot be read, as a fault of the image.

    Raises:
        OSError: the error itself, where this process or machine is short of something: no image is at fault.
    """
    if error.errno in _SHORTAGES:
        raise error
    return Faulty(reason(error))


def read(path: str, offset: int, length: int) -> bytes:
    """Up to `length` bytes of a file from `offset` on; fewer where it ends before. Asked for patiently.

    Raises:
        OSError: it cannot be read.
    """
    return patiently(lambda: _read(path, offset, length))


def patiently(ask: Callable[[], T]) -> T:
    """The answer of storage, which is asked again for a few seconds if it stumbles: what it holds is not broken.

    Raises:
        OSError: there is none.
    """
    for pause in _PAUSES_S:
        try:
            return ask()
        except OSError as error:
            if error.errno not in _STUMBLES:
                raise
            time.sleep(pause)
    return ask()


def _read(path: str, offset: int, length: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, length, offset)
    finally:
        os.close(file)
