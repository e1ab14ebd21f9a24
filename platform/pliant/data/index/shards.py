"""Tar shards: the images of a split in a few large files, as WebDataset writes them, or as `tar` packs class folders.

Two layouts are told apart, shard by shard, by whether any member ends in .cls:

    KEY.jpg (or another ending of an image) beside KEY.cls, the text file of its class: a number, or a name
    CLASS/FILE, at any depth below the class; a leading ./ does not count

Position k counts images in the order of the shards' names, and in each in the order of its members. Shards are
plain, not compressed: an image is read by its offset.
"""

from __future__ import annotations

import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from pliant.data.decoding import reason
from pliant.data.index.cache import kept_or_built, stamp
from pliant.data.index.examine import READERS, examine
from pliant.data.index.folders import SUFFIXES, joined, labelled
from pliant.data.index.split import Index, read
from pliant.data.index.table import Listing, Stamp, Table
from pliant.errors import UserError

_MOST_CLASSES = 1_000_000  # a class number above it is a mistake
_BLOCK = 512  # bytes of a header; one of zeros ends a tar
_LONGEST_CLASS = 4096  # bytes of a .cls member: longer ones hold no class


@dataclass(frozen=True)
class _Shard:
    """The images of one shard."""

    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    classes: list[str]
    """One for each image."""
    given: bool
    """They were written in .cls members; else they are the names of folders."""


def scan_shards(
    folder: Path,
    pattern: str,
    class_list: Sequence[str] | None,
    *,
    names: Sequence[str] | None = None,
    strict: bool = True,
) -> Index:
    """Index the images in the shards of a folder.

    Args:
        folder: where the shards are.
        pattern: what their names match, for instance train-*.tar.
        class_list: names of the classes in the order of the labels; where classes are numbers, the name of each
            number. None: the names found, sorted; or the numbers up to the highest.
        names: `class_list` where classes are numbers and that is None; else passed over.
        strict: read and decode every image once, so that a broken one is known from the start; else headers alone.

    Raises:
        UserError: a shard cannot be read, is no plain tar, or holds a link or a name that leads out of it; an image
            has no class, or one that `class_list` lacks; there are no images.
    """
    shards = sorted(path.name for path in folder.glob(pattern))
    if not shards:
        raise UserError(f"No shard in {folder} matches {pattern}: write the folder above train/*.tar as --data.root.")

    def build() -> Table:
        listing = _listed(folder, shards)
        _class_names(listing, class_list, names)  # refused before every image is read
        return examine(listing, strict=strict)

    table = kept_or_built(folder, pattern, sources=shards, strict=strict, build=build)
    return labelled(table, *_class_names(table.listing, class_list, names))


def _class_names(
    listing: Listing, class_list: Sequence[str] | None, names: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the classes in the order of the labels, and those of the listing's own numbers."""
    if class_list is None and listing.numbered:
        class_list = names
    if class_list is None:
        return listing.classes, listing.classes
    classes = tuple(class_list)
    own = listing.classes
    if listing.numbered:
        own = classes[: len(own)] + own[len(classes) :]
    known = set(classes)
    strangers = [name for name in own if name not in known]
    if strangers:
        raise UserError(
            f"The class {strangers[0]} of the shards in {listing.folder} is none of the {len(classes)} known classes: "
            "leave its images out, or add the class to the training images or to the class list."
        )
    return classes, own


def _listed(folder: Path, shards: list[str]) -> Listing:
    with ThreadPoolExecutor(READERS) as readers:
        stamps = list(readers.map(partial(_stamped, folder), shards))
        found = list(readers.map(lambda name: _read_shard(folder / name), shards))
    counts = [len(shard.ends) for shard in found]
    if not sum(counts):
        raise UserError(
            f"The shards in {folder} hold no image: pack members that end in {', '.join(SUFFIXES)} into them."
        )
    texts = set().union(*(shard.classes for shard in found))
    numbered = all(shard.given for shard in found if shard.classes) and all(text.isdecimal() for text in texts)
    number_of = {text: int(text) for text in texts} if numbered else {name: k for k, name in enumerate(sorted(texts))}
    if numbered and max(number_of.values()) > _MOST_CLASSES:
        raise UserError(
            f"A .cls member of the shards in {folder} says class {max(number_of.values())}: "
            "pack them anew with class numbers from 0 on."
        )
    before = np.cumsum([0, *(len(shard.names) for shard in found[:-1])])
    return Listing(
        folder=folder,
        sources=tuple(shards),
        whole=False,
        classes=tuple(map(str, range(max(number_of.values()) + 1))) if numbered else tuple(number_of),
        numbered=numbered,
        source=np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        label=np.array([number_of[name] for shard in found for name in shard.classes], np.int32),
        names=np.concatenate([shard.names for shard in found]),
        ends=np.concatenate([shard.ends for shard in found]) + np.repeat(before, counts),
        offset=np.concatenate([shard.offset for shard in found]),
        length=np.concatenate([shard.length for shard in found]),
        stamps=tuple(stamps),
    )


def _stamped(folder: Path, name: str) -> Stamp:
    try:
        return stamp(folder, name)
    except OSError as error:
        raise _unreadable(folder / name, error) from None


def _read_shard(path: Path) -> _Shard:
    """Its images, found in one walk over the headers of its members.

    Raises:
        UserError: it is damaged or holds what shards do not; an image has no class.
    """
    images: list[tuple[str, int, int]] = []
    classes: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                name = _checked_name(path, member)
                if not member.isreg() or PurePosixPath(name).name.startswith("."):
                    continue
                if name.lower().endswith(SUFFIXES):
                    images.append((name, member.offset_data, member.size))
                elif name.endswith(".cls"):
                    content = read(str(path), member.offset_data, min(member.size, _LONGEST_CLASS))
                    classes[_key(name)] = sys.intern(content.decode(errors="replace").strip())
            if read(str(path), shard.offset, _BLOCK) != bytes(_BLOCK):  # tarfile takes this for the end
                raise tarfile.ReadError(f"byte {shard.offset} begins neither a member nor its end")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _unreadable(path, error) from None
    if classes:
        images = [one for one in images if not is_beside(one[0])]
    names = [name for name, _, _ in images]
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"The shard {path} holds two images named {twice!r}: pack it anew, each image once.")
    return _Shard(
        *joined(names),
        np.array([offset for _, offset, _ in images], np.int64),
        np.array([length for _, _, length in images], np.int64),
        [_class_of(path, name, classes) for name in names],
        bool(classes),
    )


def _checked_name(path: Path, member: tarfile.TarInfo) -> str:
    """The member's name without a leading ./; refused if it is none that an image may have."""
    name = member.name.removeprefix("./")
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        fault = "whose name leads out of it"
    elif member.islnk() or member.issym():
        fault = "which is a link"
    elif not (member.isreg() or member.isdir()) or member.issparse():
        fault = "which is no plain file"
    else:
        return name
    raise UserError(f"The shard {path} holds {member.name!r}, {fault}: pack it anew from plain files with plain names.")


def is_beside(name: str) -> bool:
    """Whether a member of a sample, with the ending of an image, is not its image: that is KEY and the ending alone,
    and KEY.mask.png is something else."""
    return name[len(_key(name)) :].lower() not in SUFFIXES


def _key(name: str) -> str:
    """What the members of one sample share: all before the first stop of the file's name."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _class_of(path: Path, name: str, classes: dict[str, str]) -> str:
    if classes:
        found = classes.get(_key(name), "")
        missing = f"{_key(name)}.cls with its class beside it"
    else:
        folder, slash, _ = name.partition("/")
        found = folder if slash else ""
        missing = f"it in a folder CLASS, or {_key(name)}.cls with its class beside it"
    if not found:
        raise UserError(f"The image {name!r} in the shard {path} has no class: pack {missing}.")
    return sys.intern(found)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"The shard {path} cannot be read as a plain tar ({reason(error)}): copy it again, uncompressed, or remove it."
    )
