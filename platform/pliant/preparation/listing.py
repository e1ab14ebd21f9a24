"""Encoded images and where their bytes lie: a file each, or stretches of tar archives.

A million images are arrays here, not objects. Listing reads no image.

Shapes: N images.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pliant.aside import written_aside
from pliant.data.index import SUFFIXES, class_folders, is_beside
from pliant.errors import UserError
from pliant.preparation.span import Span
from pliant.preparation.tars import members


class Entry(NamedTuple):
    """One image of a listing in the making."""

    name: str
    label: int
    archive: int
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of one split."""

    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    names: NDArray[np.bytes_]
    """(N,), CLASS/FILE, encoded for the file system."""
    labels: NDArray[np.int32]
    """(N,), index into `classes`."""
    places: NDArray[np.int64]
    """(N, 3): index into `archives`, offset and size in bytes."""
    archives: tuple[Path, ...]
    """Where the bytes lie: archives; or the folder below which each image is a file of its name."""
    folder: bool = False
    """It is a folder."""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, position: int) -> str:
        """CLASS/FILE of the image at `position`."""
        return os.fsdecode(self.names[position])

    def span(self, position: int) -> Span:
        """Where the bytes of the image at `position` lie."""
        archive, offset, size = (int(value) for value in self.places[position])
        path = self.archives[archive]
        if self.folder:
            return Span(os.path.join(path, self.name(position)), offset, size, whole=True)
        return Span(str(path), offset, size, whole=False)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,), bytes of each image."""
        return self.places[:, 2]


def build(
    classes: Sequence[str], archives: Sequence[Path], entries: Iterable[Entry], *, folder: bool = False
) -> Listing:
    """A listing of these images.

    Raises:
        UserError: there are none, or two have one name.
    """
    columns = list(zip(*entries, strict=True))
    if not columns:
        raise UserError(f"{archives[0]} holds no images: write another one.")
    names = np.array([os.fsencode(name) for name in columns[0]])
    unique, counts = np.unique(names, return_counts=True)
    if len(unique) < len(names):
        twice = os.fsdecode(unique[counts.argmax()])
        raise UserError(f"{archives[0]} holds two images named {twice}: write an archive in which each comes once.")
    places = np.array(columns[2:], np.int64).T.copy()
    return Listing(tuple(classes), names, np.array(columns[1], np.int32), places, tuple(archives), folder)


def of_folder(folder: Path) -> Listing:
    """The image files folder/CLASS/FILE, sorted by name; deeper folders belong to their class. A link that leads
    nowhere has the size -1.

    Raises:
        UserError: there are none, or the folder cannot be read.
    """
    classes = class_folders(folder)

    def entries() -> Iterator[Entry]:
        for label, name in enumerate(classes):
            for path, size in sorted(_walk(os.path.join(folder, name), name)):
                yield Entry(path, label, 0, 0, size)

    return build(classes, (folder,), entries(), folder=True)


def of_shards(paths: Sequence[Path]) -> Listing:
    """The images in tar archives, for reading only: their classes are not looked at.

    Raises:
        UserError: there are none, or an archive cannot be read or holds what it should not.
    """

    def entries() -> Iterator[Entry]:
        for number, path in enumerate(paths):
            found = list(members(path))
            sampled = any(member.name.endswith(".cls") for member in found)
            for member in found:
                if is_image(member.name) and not (sampled and is_beside(member.name)):
                    yield Entry(f"{path.name}/{member.name}", 0, number, member.offset_data, member.size)

    return build(("",), paths, entries())


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image; hidden ones, as macOS leaves them behind, do not."""
    return name.lower().endswith(SUFFIXES) and not PurePosixPath(name).name.startswith(".")


def save(listing: Listing, path: Path, key: str) -> None:
    """Keep a listing, under a key that tells what was listed. Whole or not at all: what was written is lost with it."""
    archives = [str(path) for path in listing.archives]
    text = json.dumps({"key": key, "classes": listing.classes, "archives": archives, "folder": listing.folder})
    with written_aside(path, flush=True) as beside, open(beside, "wb") as file:
        np.savez(file, names=listing.names, labels=listing.labels, places=listing.places, text=np.array(text))


def load(path: Path, key: str) -> Listing | None:
    """The listing kept there under that key; None if there is none."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            text = json.loads(str(kept["text"]))
            names, labels, places = kept["names"], kept["labels"], kept["places"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # absent, or cut short by a power failure: listed anew
    if text["key"] != key:
        return None
    archives = tuple(Path(archive) for archive in text["archives"])
    return Listing(tuple(text["classes"]), names, labels, places, archives, text["folder"])


def _bytes_of(entry: os.DirEntry[str]) -> int:
    """-1 of a file that is not there, as behind a link that leads nowhere."""
    try:
        return entry.stat().st_size
    except OSError:
        return -1


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    """Path from the class folder's name on, and size in bytes, of each image file."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from _walk(entry.path, f"{prefix}/{entry.name}")
                elif is_image(entry.name):
                    yield f"{prefix}/{entry.name}", _bytes_of(entry)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error.strerror}): mend its permissions.") from None
