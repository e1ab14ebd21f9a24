"""Tar shards: ROOT/train/*.tar and ROOT/val/*.tar, or ROOT/train-*.tar and ROOT/val-*.tar.

What may be in them: `pliant.data.index.shards`. `pliant data` writes the latter, with the names of the classes in
ROOT/classes.txt, and numbers them from SPLIT-000000.tar on.
"""

from __future__ import annotations

import json
from pathlib import Path

from pliant.data.index import Index, scan_shards
from pliant.data.sources.folder import read_class_list
from pliant.errors import UserError

_LAYOUT = "train/*.tar or train-*.tar, and val likewise"


def open_shards(root: Path | None, class_list: Path | None, *, strict: bool = True) -> tuple[Index, Index | None]:
    """Index the training and the validation images.

    Args:
        root: the folder that holds the shards, or the folders train and val with them.
        class_list: text file with one class name per line, in the order of the labels; None: the names found, sorted,
            or the lines of ROOT/classes.txt where classes are numbers.
        strict: read and decode every image once, so that broken ones are known from the start; else headers alone.

    Returns:
        Training and validation images with the same classes; None where there are no shards of `val`.

    Raises:
        UserError: there are no shards for training, one cannot be used, some are not there yet, or a class of `val` is
            not in `train`.
    """
    if root is None:
        raise UserError(f"No dataset was named: write --data.root /path/to/shards, a folder that holds {_LAYOUT}.")
    for split in ("train", "val"):
        _refuse_unfinished(root, split)
    found = find_shards(root, "train")
    if found is None:
        raise UserError(f"The data root {root} holds no shards: write a folder that holds {_LAYOUT} as --data.root.")
    own = root / "classes.txt"
    train = scan_shards(
        *found,
        None if class_list is None else read_class_list(class_list),
        names=read_class_list(own) if class_list is None and own.is_file() else None,
        strict=strict,
    )
    if len(train.classes) < 2:
        raise UserError(
            f"The shards in {found[0]} hold one class only, {train.classes[0]}: a classifier needs at least two."
        )
    held = find_shards(root, "val")
    val = None if held is None else scan_shards(*held, train.classes, strict=strict)
    _refuse_lost(root, "train", found[0], len(train))
    if held is not None and val is not None:
        _refuse_lost(root, "val", held[0], len(val))
    return train, val


def find_shards(root: Path, split: str) -> tuple[Path, str] | None:
    """The folder and the pattern of a split's shards; None where there are none. A folder of its own goes first."""
    for folder, pattern in ((root / split, "*.tar"), (root, f"{split}-*.tar")):
        if any(folder.glob(pattern)):
            return folder, pattern
    return None


def _refuse_lost(root: Path, split: str, folder: Path, images: int) -> None:
    """Refuses fewer or more images than `pliant data` recorded of the shards in root: the last may be gone, and leave
    no gap. Those in a folder of their own are not its."""
    record = root / f"prepared-{split}.json"
    if folder != root or not record.is_file():
        return
    try:
        recorded = json.loads(record.read_text(encoding="utf-8")).get("images", images)
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{record} cannot be read: remove it if the shards of {split} are all there.") from None
    if recorded != images:
        raise UserError(
            f"The shards of {split} in {root} hold {images} images, and {record.name} says {recorded}: bring all "
            "of them back, or remove that file if you packed them anew."
        )


def _refuse_unfinished(root: Path, split: str) -> None:
    """Refuses shards some of which `pliant data` has not yet moved into their place: the number 0 comes last."""
    if any((root / f".{split}.partial" / "content").glob("*.tar")):
        raise UserError(
            f"The shards of {split} in {root} are not finished: give the command of pliant data that began them again."
        )
    numbers = {int(path.stem[-6:]) for path in root.glob(f"{split}-{'[0-9]' * 6}.tar")}
    missing = next((number for number in range(len(numbers)) if number not in numbers), None)
    if missing is not None:
        raise UserError(
            f"The shards of {split} in {root} lack {split}-{missing:06d}.tar: finish with the command that began them, "
            "or number them from 000000 on without a gap."
        )
