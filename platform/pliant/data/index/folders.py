"""Folders of classes: CLASS/FILE, at any depth below the class."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pliant.data.index.cache import kept_or_built, stamp
from pliant.data.index.examine import READERS, examine
from pliant.data.index.split import Index
from pliant.data.index.table import Listing, Stamp, Table
from pliant.errors import UserError, printable

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
"""Endings of the files that count as images, in small letters; all others are passed over."""


def scan(folder: Path, class_list: Sequence[str] | None, *, strict: bool = True) -> Index:
    """Index the images of `folder`/CLASS/FILE.

    Args:
        folder: what holds one folder per class.
        class_list: class folder names in the order of the labels; not all need to be there. None: the folders
            found, sorted by name.
        strict: read and decode every image once, so that a broken one is known from the start; else headers alone.

    Raises:
        UserError: the folder cannot be read, holds no class folder or one that `class_list` lacks, or a class has no
            images.
    """
    found = class_folders(folder)
    if not found:
        raise UserError(f"The folder {folder} holds no class folders: move each image to {folder}/CLASS/FILE.")
    classes = tuple(class_list) if class_list is not None else tuple(found)
    known = set(classes)
    strangers = [name for name in found if name not in known]
    if strangers:
        raise UserError(
            f"The class folder {folder / strangers[0]} is none of the {len(classes)} known classes: "
            "remove it, or add the class to the training images or to the class list."
        )
    table = kept_or_built(folder, "folder", sources=found, strict=strict, build=lambda: _built(folder, found, strict))
    return labelled(table, classes)


def labelled(table: Table, classes: tuple[str, ...], own: tuple[str, ...] | None = None) -> Index:
    """All images of a table, labelled by the order of `classes`.

    Args:
        own: what the classes that the table counts are called in `classes`; None: as in the table.
    """
    labels, own = table.listing.label, own or table.listing.classes
    if classes[: len(own)] != own:
        numbers = {name: number for number, name in enumerate(classes)}
        labels = np.array([numbers[name] for name in own], np.int32)[labels]
    return Index(table, None, labels, table.size, classes)


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


def joined(names: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of all names one after the other, and where each ends."""
    encoded = [os.fsencode(name) for name in names]
    return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([len(name) for name in encoded], dtype=np.int64)


@dataclass(frozen=True)
class _Found:
    """The image files below one class folder, sorted by name, and the folders they are in."""

    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    folders: list[Stamp]


def _built(folder: Path, classes: list[str], strict: bool) -> Table:
    began = time.time_ns()
    with ThreadPoolExecutor(READERS) as readers:
        found = list(readers.map(partial(_list_images, folder), classes))
    counts = [len(listing.ends) for listing in found]
    number = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    before = np.cumsum([0, *(len(listing.names) for listing in found[:-1])])
    listing = Listing(
        folder=folder,
        sources=tuple(classes),
        whole=True,
        classes=tuple(classes),
        numbered=False,
        source=number,
        label=number,
        names=np.concatenate([one.names for one in found]),
        ends=np.concatenate([one.ends for one in found]) + np.repeat(before, counts),
        offset=np.zeros(len(number), np.int64),
        length=np.zeros(len(number), np.int64),
        stamps=tuple(one for listing in found for one in listing.folders),
    )
    return _with_broken_watched(examine(listing, strict=strict), began)


def _list_images(folder: Path, name: str) -> _Found:
    stamps: list[Stamp] = []
    try:
        found = sorted(_walk(folder, name, "", stamps.append, frozenset()))
    except OSError as error:
        place = printable(os.fsdecode(error.filename or folder / name))
        if error.errno == errno.ELOOP:
            raise UserError(f"The link {place} leads back to itself: remove it.") from None
        raise UserError(
            f"The folder {place} cannot be read ({error.strerror}): mend its permissions or remove it."
        ) from None
    if not found:
        raise UserError(
            f"The class folder {folder / name} holds no image: "
            f"add files that end in {', '.join(SUFFIXES)}, or remove it."
        )
    return _Found(*joined(found), stamps)


def _walk(folder: Path, name: str, prefix: str, met: Callable[[Stamp], None], above: frozenset[str]) -> list[str]:
    """Name below the class folder `name` of each image file.

    Args:
        prefix: the folder below `name` to look into, with a slash at its end.
        met: told of every folder that was read.
        above: those that the walk came through, as they really are.

    Raises:
        OSError: a folder cannot be read, or a link leads back to one of those above it.
    """
    place = os.path.join(folder, name, prefix)
    real = os.path.realpath(place)
    if real in above:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), place.rstrip("/"))
    met(stamp(folder, f"{name}/{prefix}"))
    found = []
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                found += _walk(folder, name, f"{prefix}{entry.name}/", met, above | {real})
            elif _is_named_image(entry):
                found.append(prefix + entry.name)
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, whatever it is called. An image that is a link to itself is a broken image."""
    try:
        return entry.is_dir()
    except OSError:
        if _is_named_image(entry):
            return False
        raise


def _is_named_image(entry: os.DirEntry[str]) -> bool:
    return entry.name.lower().endswith(SUFFIXES)


def _with_broken_watched(table: Table, began: int) -> Table:
    """A broken file that is written over keeps its folder's time, so its own is looked at as well.

    Args:
        began: when the scan did, in ns: a file that was mended since may have been read before.
    """
    listing = table.listing
    stamps = []
    for row in np.flatnonzero(table.broken)[: len(table.reasons)].tolist():
        with suppress(OSError):  # a link to nowhere
            source = listing.sources[listing.source[row]]
            name, changed, length = stamp(listing.folder, f"{source}/{listing.name(row)}")
            stamps.append((name, changed if changed < began else -1, length))
    return replace(table, listing=replace(listing, stamps=(*listing.stamps, *stamps)))
