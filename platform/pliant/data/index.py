"""What there is: the images of one split, found once and kept compactly.

An `Index` lists image files, `Pixels` holds small images themselves; both know the label of each image, and
position k means the same image in every part of a run. Reading a million headers takes minutes, so `scan`
remembers the sizes in a file below ~/.cache/pliant for as long as the folder's files keep their names,
lengths and times.

Shapes: N images of the split.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pliant.errors import UserError

_log = logging.getLogger(__name__)

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files that count as images, in small letters; all others are passed over."""
_READERS = 8  # threads that list folders and read headers: they wait for storage more than they compute
_CHUNK = 512  # headers read by one task of a thread


@dataclass(frozen=True, eq=False)
class Index:
    """The image files of one split."""

    folder: Path
    """What holds the class folders."""
    names: NDArray[np.bytes_]
    """(N,), each file's path below its class folder, encoded for the file system."""
    labels: NDArray[np.int32]
    """(N,), index into `classes`."""
    sizes: NDArray[np.int32]
    """(N, 2), height and width in pixels as stored in the file: an EXIF rotation is not applied."""
    classes: tuple[str, ...]
    """Names of the class folders, in the order of the labels."""

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, position: int) -> str:
        """The file of the image at `position` in [0, N)."""
        return os.path.join(self.folder, self.classes[self.labels[position]], os.fsdecode(self.names[position]))

    def subset(self, positions: NDArray[np.int64]) -> Index:
        """The images at `positions`, in that order, numbered anew from 0."""
        return replace(self, names=self.names[positions], labels=self.labels[positions], sizes=self.sizes[positions])


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

    def subset(self, positions: NDArray[np.int64]) -> Pixels:
        """The images at `positions`, in that order, numbered anew from 0."""
        return replace(self, images=self.images[positions], labels=self.labels[positions])


Split = Index | Pixels


@dataclass(frozen=True)
class _Found:
    """The image files below one class folder, sorted by name."""

    names: tuple[str, ...]
    fingerprint: bytes
    """Digest of the folder's name and of the names, lengths and times of all of them."""


def scan(folder: Path, class_list: Sequence[str] | None) -> Index:
    """Index the images of `folder`/CLASS/FILE.

    Args:
        folder: what holds one folder per class.
        class_list: class folder names in the order of the labels; not all need to be there. None: the folders
            found, sorted by name.

    Raises:
        UserError: the folder cannot be read, holds no class folder or one that `class_list` lacks, a class
            has no images, or a file is no image.
    """
    found = class_folders(folder)
    if not found:
        raise UserError(f"The folder {folder} holds no class folders: move each image to {folder}/CLASS/FILE.")
    classes = tuple(class_list) if class_list is not None else tuple(found)
    numbers = {name: number for number, name in enumerate(classes)}
    strangers = [name for name in found if name not in numbers]
    if strangers:
        raise UserError(
            f"The class folder {folder / strangers[0]} is none of the {len(classes)} known classes: "
            "remove it, or add the class to the training images or to the class list."
        )
    with ThreadPoolExecutor(_READERS) as readers:
        listings = list(readers.map(_list_images, [folder / name for name in found]))
    names = np.concatenate([np.array([os.fsencode(name) for name in listing.names]) for listing in listings])
    lengths = [len(listing.names) for listing in listings]
    labels = np.repeat(np.array([numbers[name] for name in found], np.int32), lengths)
    # Labels play no part in the order of the files: one cache serves any class list.
    fingerprint = hashlib.blake2b(b"".join(listing.fingerprint for listing in listings)).hexdigest()
    index = Index(folder, names, labels, np.zeros((len(names), 2), np.int32), classes)
    sizes = _cached_sizes(folder, fingerprint, len(names))
    if sizes is None:
        sizes = _read_sizes(index)
        _cache_sizes(folder, fingerprint, sizes)
    return replace(index, sizes=sizes)


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, sorted; hidden ones are passed over.

    Raises:
        UserError: `folder` cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be read ({error.strerror}): write a readable one as --data.root."
        ) from None


def _list_images(folder: Path) -> _Found:
    try:
        found = sorted(_walk(folder, ""))
    except OSError as error:
        raise UserError(
            f"The class folder {folder} cannot be read ({error.strerror}): mend its permissions or remove it."
        ) from None
    if not found:
        raise UserError(
            f"The class folder {folder} holds no image: add files that end in {', '.join(SUFFIXES)}, or remove it."
        )
    digest = hashlib.blake2b(os.fsencode(folder.name))
    for name, length, changed in found:
        digest.update(os.fsencode(name) + b"\0%d\0%d\0" % (length, changed))
    return _Found(tuple(name for name, _, _ in found), digest.digest())


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Name below the class folder, length in bytes and time of change in ns of each image file."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(SUFFIXES):
                status = entry.stat()
                yield prefix + entry.name, status.st_size, status.st_mtime_ns
            elif entry.is_dir():
                yield from _walk(folder / entry.name, f"{prefix}{entry.name}/")


def _read_sizes(index: Index) -> NDArray[np.int32]:
    """(N, 2), read from the headers of all files."""

    def read(first: int) -> list[tuple[int, int]]:
        return [_size(index.path(position)) for position in range(first, min(first + _CHUNK, len(index)))]

    _log.info("Reading the sizes of %d images below %s", len(index), index.folder)
    with warnings.catch_warnings(), ThreadPoolExecutor(_READERS) as readers:
        # Pillow warns of images above 89 megapixels; here nothing is decoded yet.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            parts = list(readers.map(read, range(0, len(index), _CHUNK)))
        except UserError:
            readers.shutdown(cancel_futures=True)  # a million other headers do not matter now
            raise
    return np.array([size for part in parts for size in part], np.int32)


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:  # a damaged file may raise anything
        raise unreadable(path, error) from None


def unreadable(path: str, error: Exception) -> UserError:
    """The sentence for a file that a decoder refuses."""
    if isinstance(error, UnidentifiedImageError):
        reason = "its format is unknown"
    else:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
    return UserError(f"The file {path} is no readable image ({reason}): replace it or remove it.")


def _cache_file(folder: Path) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=12).hexdigest()
    return Path(root) / "pliant" / f"sizes-{key}.npz"


def _cached_sizes(folder: Path, fingerprint: str, images: int) -> NDArray[np.int32] | None:
    try:
        with open(_cache_file(folder), "rb") as file, np.load(file, allow_pickle=False) as kept:
            sizes: NDArray[Any] = kept["sizes"]
            fresh = str(kept["fingerprint"]) == fingerprint and sizes.shape == (images, 2)
            return sizes.astype(np.int32) if fresh else None
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile):
        return None  # absent or damaged: the headers are read again


def _cache_sizes(folder: Path, fingerprint: str, sizes: NDArray[np.int32]) -> None:
    """Written beside and renamed, as several ranks may write at once; failing costs only the next start's time."""
    with suppress(OSError, RuntimeError):
        target = _cache_file(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, sizes=sizes, fingerprint=np.array(fingerprint))
            os.replace(beside, target)
        except BaseException:
            os.unlink(beside)
            raise
