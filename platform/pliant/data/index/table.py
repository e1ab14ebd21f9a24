"""The list of a split's images in compact arrays, and the file that keeps it.

The file is one of safetensors, a format of plain arrays behind a JSON header. It is written beside and renamed, and
opened by mapping it into memory: ranks of a machine share its pages, and only those that are used are read.

Shapes: N images, in the order of their positions.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from pliant.aside import written_aside

_DTYPES = {"U8": np.uint8, "BOOL": np.bool_, "I32": np.int32, "U32": np.uint32, "I64": np.int64}
_METADATA = "pliant.index"

Stamp = tuple[str, int, int]
"""A file or folder below the split's own, when it changed in ns, and its length (0 for a folder)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Listing:
    """Where each image lies, before any is opened."""

    folder: Path
    """What `sources` are below."""
    sources: tuple[str, ...]
    """Class folders, or shards."""
    whole: bool
    """Each image is a file of its own; else a part of a shard."""
    classes: tuple[str, ...]
    """Names of the classes that `label` counts, sorted."""
    numbered: bool
    """Classes came as numbers: their names are 0, 1, … up to the highest."""
    source: NDArray[np.int32]
    """(N,), index into `sources`."""
    label: NDArray[np.int32]
    """(N,), index into `classes`."""
    names: NDArray[np.uint8]
    """Names of all images within their sources, one after the other, encoded for the file system."""
    ends: NDArray[np.int64]
    """(N,), where each name ends in `names`."""
    offset: NDArray[np.int64]
    """(N,), first byte in its shard; 0 for a file."""
    length: NDArray[np.int64]
    """(N,), in bytes; of files only once they were opened."""
    stamps: tuple[Stamp, ...]
    """What must not have changed for the listing to hold."""

    def __len__(self) -> int:
        return len(self.label)

    def name(self, row: int) -> str:
        """The image's name within its source."""
        first = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.names[first : int(self.ends[row])].tobytes())

    def file(self, row: int) -> str:
        """The file that holds the image."""
        source = os.path.join(self.folder, self.sources[self.source[row]])
        return os.path.join(source, self.name(row)) if self.whole else source


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """A listing whose images were opened."""

    listing: Listing
    strict: bool
    """Each image was read and decoded whole; else only its header was, and `crc` is 0."""
    size: NDArray[np.int32]
    """(N, 2), height and width in pixels as stored: an EXIF rotation is not applied. 1 where broken."""
    crc: NDArray[np.uint32]
    """(N,), crc32 of the bytes."""
    broken: NDArray[np.bool_]
    """(N,), cannot be used."""
    reasons: tuple[str, ...]
    """Why, for the first of them."""


def write_table(table: Table, path: Path, *, contended: bool = False) -> None:
    """Keep a table: whole, or not at all.

    Args:
        contended: other processes may write the same one meanwhile, as in `written_aside`.

    Raises:
        OSError: `path` cannot be written.
    """
    listing = table.listing
    arrays: dict[str, NDArray[Any]] = {name: getattr(listing, name) for name in _LISTED} | {
        name: getattr(table, name) for name in _FOUND
    }
    words = {name: getattr(listing, name) for name in ("sources", "whole", "classes", "numbered", "stamps")}
    words |= {"strict": table.strict, "reasons": table.reasons}
    with written_aside(path, flush=True, contended=contended) as beside:
        beside.write_bytes(save(arrays, {_METADATA: json.dumps(words)}))


def open_table(path: Path, folder: Path) -> Table:
    """Map a kept table into memory.

    Args:
        folder: what its sources are below now.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is absent, damaged or of another version.
    """
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > os.fstat(file.fileno()).st_size:
            raise ValueError("The file is shorter than its header.")
        header = json.loads(file.read(start - 8))
    words = json.loads(header.pop("__metadata__")[_METADATA])
    content = np.memmap(path, np.uint8, "r")
    arrays = {name: _array(content[start:], entry) for name, entry in header.items()}
    listing = Listing(
        folder=folder,
        sources=tuple(words["sources"]),
        whole=words["whole"],
        classes=tuple(words["classes"]),
        numbered=words["numbered"],
        stamps=tuple((name, changed, length) for name, changed, length in words["stamps"]),
        **{name: arrays[name] for name in _LISTED},
    )
    found = {name: arrays[name] for name in _FOUND}
    return Table(listing=listing, strict=words["strict"], reasons=tuple(words["reasons"]), **found)


_LISTED = ("source", "label", "names", "ends", "offset", "length")
_FOUND = ("size", "crc", "broken")


def _array(content: NDArray[np.uint8], entry: dict[str, Any]) -> NDArray[Any]:
    first, end = entry["data_offsets"]
    if end > len(content):
        raise ValueError("The file is shorter than its header says.")
    return content[first:end].view(np.ndarray).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
