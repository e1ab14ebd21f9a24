"""ImageNet from its three archives, and any image folder, into class folders or shards.

ILSVRC2012_img_train.tar holds a tar archive for each of 1,000 classes, named by its wnid; ILSVRC2012_img_val.tar holds
50,000 images, whose classes stand elsewhere (see truth.py). Class numbers are those of the sorted wnids.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from pliant.data.index import class_folders
from pliant.data.sources.folder import read_class_list
from pliant.errors import UserError
from pliant.preparation import writers
from pliant.preparation.listing import Entry, Listing, build, is_image, load, of_folder, save
from pliant.preparation.progress import note, progress
from pliant.preparation.span import Changed
from pliant.preparation.staging import begin, check_space, discard, forget, record, recorded, staging, write_text
from pliant.preparation.tars import members, nested_members
from pliant.preparation.writers import FormName, Sharding

SplitName = Literal["train", "val"]

CLASS_LIST = "classes.txt"
MARK = "sample.json"
"""Its presence in a dataset's root tells `open_dataset` that the images were generated."""
_CLASSES = 1000
_IMAGES = {"train": 1_281_167, "val": 50_000}  # of ILSVRC2012


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where images are written, and as what."""

    root: Path
    form: FormName
    sharding: Sharding


def prepare_train(archive: Path, target: Target) -> str:
    """Write the training images. Returns what there is to say of it.

    Raises:
        UserError: the archive is damaged or unsafe, there is no room, or something else stands in the place.
    """
    return _prepare("train", _source(archive), target, lambda: list_train(archive))


def prepare_val(archive: Path, wnids: Callable[[], Mapping[str, str]], target: Target) -> str:
    """Write the validation images, each below its wnid. Returns what there is to say of it.

    Args:
        archive: of the images.
        wnids: gives the wnid of each image, by file name.
        target: where to.

    Raises:
        UserError: as `prepare_train`; or an image is not among `wnids`, or a class not among root's classes.
    """

    def listed() -> Listing:
        known = wnids()
        return list_val(archive, known, _classes(target.root) or tuple(sorted(set(known.values()))))

    return _prepare("val", _source(archive), target, listed)


def require_readable(archive: Path) -> None:
    """Refuses an archive that is not there, before hours are spent on another.

    Raises:
        UserError: it cannot be read.
    """
    _source(archive)


def require_known_classes(root: Path, splits: Sequence[SplitName]) -> None:
    """Refuses validation images of classes that the training images lack, before a split is written.

    Raises:
        UserError: there are some.
    """
    known = set(class_folders(root / "train"))
    for split in splits:
        strangers = sorted(set(class_folders(root / split)) - known)
        if strangers:
            raise _stranger(root / split / strangers[0])


def prepare_folder(folder: Path, split: SplitName, target: Target) -> str:
    """Write the images of folder/CLASS/FILE. Returns what there is to say of it.

    Raises:
        UserError: as `prepare_train`; or a class of the folder is not among root's classes.
    """

    def listed() -> Listing:
        listing = of_folder(folder)
        gone = np.flatnonzero(listing.sizes < 0)
        if len(gone):
            raise UserError(f"The image {folder / listing.name(int(gone[0]))} leads nowhere: mend or remove the link.")
        return relabelled(listing, _classes(target.root) or listing.classes, folder)

    path = str(folder.resolve())
    mark = folder.parent / MARK
    return _prepare(split, _Source({"source": path}, path, mark if mark.is_file() else None), target, listed)


def list_train(archive: Path) -> Listing:
    """The images of the archive of class archives, without reading one.

    Raises:
        UserError: it is damaged or unsafe, or holds no class archives.
    """
    inner = {}
    for member in members(archive):
        name = PurePosixPath(member.name)
        if name.suffix != ".tar" or name.name.startswith("."):
            continue
        if name.stem in inner:
            raise UserError(f"The archive {archive} holds {name.name} twice: fetch it again.")
        inner[name.stem] = member
    if not inner:
        raise UserError(
            f"The archive {archive} holds no archives of classes, such as n01440764.tar: write "
            "ILSVRC2012_img_train.tar as --train."
        )
    classes = tuple(sorted(inner))
    labels = {name: label for label, name in enumerate(classes)}

    def entries() -> Iterator[Entry]:
        with progress(f"Listing {archive.name}", len(inner)) as advance:
            for wnid, outer in inner.items():
                for member in nested_members(archive, outer):
                    if is_image(member.name):
                        name = f"{wnid}/{PurePosixPath(member.name).name}"
                        yield Entry(name, labels[wnid], 0, member.offset_data, member.size)
                advance(1)

    return build(classes, (archive,), entries())


def list_val(archive: Path, wnids: Mapping[str, str], classes: tuple[str, ...]) -> Listing:
    """The images of the archive of validation images, without reading one.

    Raises:
        UserError: it is damaged or unsafe, an image is not among `wnids`, or its wnid not among `classes`.
    """
    labels = {name: label for label, name in enumerate(classes)}

    def entries() -> Iterator[Entry]:
        for member in members(archive):
            if not is_image(member.name):
                continue
            name = PurePosixPath(member.name).name
            wnid = wnids.get(name)
            if wnid is None:
                raise UserError(
                    f"{archive} holds {name}, whose class is not known: write the development kit or the list that "
                    "belongs to it."
                )
            if wnid not in labels:
                raise UserError(f"{name} in {archive} has the class {wnid}, which no training image has.")
            yield Entry(f"{wnid}/{name}", labels[wnid], 0, member.offset_data, member.size)

    listing = build(classes, (archive,), entries())
    if len(listing) < len(wnids):
        raise UserError(f"{archive} holds {len(listing)} images and {len(wnids)} have a class: fetch it again.")
    return listing


def relabelled(listing: Listing, classes: tuple[str, ...], folder: Path) -> Listing:
    """The listing with its labels as indices into `classes`.

    Raises:
        UserError: a class is not among them.
    """
    strangers = sorted(set(listing.classes) - set(classes))
    if strangers:
        raise _stranger(folder / strangers[0])
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for name in listing.classes], np.int32)
    return replace(listing, classes=classes, labels=labels[listing.labels])


def _stranger(folder: Path) -> UserError:
    return UserError(f"The class folder {folder} is not among the training classes: remove it.")


@dataclass(frozen=True)
class _Source:
    """What images are written from."""

    described: dict[str, object]
    """By what it is known again, wherever it lies then."""
    key: str
    """Changes where what was listed may no longer be so."""
    mark: Path | None = None
    """The file beside the images that says that they were generated; None where they were not."""


def _source(archive: Path) -> _Source:
    try:
        status = archive.stat()
    except OSError as error:
        raise UserError(f"The archive {archive} cannot be read ({error.strerror}): write where it lies.") from None
    described = {"source": archive.name, "source_bytes": status.st_size}
    return _Source(described, f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}")


def _prepare(split: SplitName, source: _Source, target: Target, listed: Callable[[], Listing]) -> str:
    """Listed, checked, written, verified, recorded, moved into place: each of them once, however often stopped."""
    root, form = target.root, target.form
    settings = {**writers.described(form, target.sharding), **source.described}
    entry = recorded(root, split)
    is_recorded = settings.items() <= entry.items()
    place = writers.place(root, split, form)
    if is_recorded and place.exists():
        if form == "shards":
            _refuse_lost(root, split, entry["images"], target.sharding)
        _copy_mark(source, root)
        discard(root, split)
        return f"{root}: {split} is complete already, {entry['images']:,} images"
    with staging(root, split, settings) as folder:
        # Recorded and still here: it was stopped while it was moved into place.
        if not (is_recorded and (folder / "content").is_dir()):
            entry = _written(split, source, target, folder, settings, listed)
        _copy_mark(source, root)
        writers.publish(folder / "content", root, split, form)
        discard(root, split)
    return f"{root}: {split} is complete, {entry['images']:,} images of {entry['classes']:,} classes"


def _refuse_lost(root: Path, split: SplitName, images: int, sharding: Sharding) -> None:
    """Refuses to call shards complete some of which are gone.

    Raises:
        UserError: some are.
    """
    for number in range(writers.shards_of(images, sharding)):
        path = root / f"{split}-{number:06d}.tar"
        if not path.exists():
            raise UserError(
                f"{path} is gone, of the shards that this command wrote: bring it back, or remove the others, and the "
                "same command writes all of them again."
            )


def _written(
    split: SplitName,
    source: _Source,
    target: Target,
    folder: Path,
    settings: Mapping[str, object],
    listed: Callable[[], Listing],
) -> dict[str, Any]:
    """Write the split to folder/content and record it. Returns the record."""
    root, form, name = target.root, target.form, source.described["source"]
    _check_place(root, split, form)
    listing = load(folder / "listing.npz", source.key) or _listed_anew(folder, listed)
    _check_text(listing.classes, str(name))
    classes = _classes(root)
    if classes and classes != listing.classes:
        raise UserError(f"{root / CLASS_LIST} names other classes than {name}: write another folder as --to.")
    check_space(folder / "content", writers.needed_bytes(listing, form))
    forget(root, split)
    content = begin(folder, settings)
    save(listing, folder / "listing.npz", source.key)
    try:
        with progress(f"Writing {split}", len(listing)) as advance:
            if form == "folders":
                writers.write_folders(listing, content, advance)
            else:
                writers.write_shards(listing, content, split, target.sharding, advance)
    except Changed:
        (folder / "listing.npz").unlink()
        raise
    writers.verify(listing, content, form)
    if len(listing.classes) == _CLASSES and len(listing) != _IMAGES[split]:
        note(f"warning: ILSVRC2012 has {_IMAGES[split]:,} images in {split}, and {name} has {len(listing):,}.")
    write_text(root / CLASS_LIST, "".join(f"{name}\n" for name in listing.classes))
    size = int(listing.sizes.sum())
    entry = {**settings, "images": len(listing), "classes": len(listing.classes), "bytes": size}
    record(root, split, entry)
    return entry


def _listed_anew(folder: Path, listed: Callable[[], Listing]) -> Listing:
    """The listing, and nothing left of what was written by another: images lay elsewhere in it, or were others."""
    listing = listed()
    if (folder / "content").is_dir():
        shutil.rmtree(folder / "content")
    return listing


def _copy_mark(source: _Source, root: Path) -> None:
    """Images that were generated are so in shards too, and it is said wherever a result is shown."""
    if source.mark is not None and not (root / MARK).exists():
        write_text(root / MARK, source.mark.read_text(encoding="utf-8"))


def _check_place(root: Path, split: SplitName, form: FormName) -> None:
    there = [root / split, *sorted(root.glob(f"{split}-*.tar"))]
    found = next((path for path in there if path.exists()), None)
    if found is not None:
        raise UserError(
            f"{found} is there already, and is not what this command writes from this source: move it away, or write "
            "another folder as --to."
        )


def _check_text(classes: tuple[str, ...], source: str) -> None:
    """The list of classes is text, in UTF-8, and so are their names; those of images may be any bytes."""
    for name in classes:
        if any("\ud800" <= character <= "\udfff" for character in name):  # what Python puts for other bytes
            raise UserError(f"The name {os.fsencode(name)!r} of a class in {source} is not UTF-8: rename it.")


def _classes(root: Path) -> tuple[str, ...]:
    """The names in root's class list; none where there is no list."""
    path = root / CLASS_LIST
    return read_class_list(path) if path.is_file() else ()
