"""Folders of classes: ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE, as ImageNet is unpacked everywhere.

Without a folder `train`, ROOT itself holds the class folders, and all images are training images.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pliant.data.index import Index, class_folders, scan
from pliant.errors import UserError

_LAYOUT = "train/CLASS/FILE.JPEG and val/CLASS/FILE.JPEG"


def open_folder(root: Path | None, class_list: Path | None, *, strict: bool = True) -> tuple[Index, Index | None]:
    """Index the training and the validation images.

    Args:
        root: the dataset's folder.
        class_list: text file with one class folder name per line; None: the training folders, sorted by name.
        strict: read and decode every image once, so that broken ones are known from the start; else headers alone.

    Returns:
        Training and validation images with the same classes; None where there is no folder `val`.

    Raises:
        UserError: the root is missing, no folder or empty, it is laid out otherwise, a class of `val` is not
            in `train`, or the scan finds a class without images.
    """
    folder = _training_folder(root)
    train = scan(folder, None if class_list is None else read_class_list(class_list), strict=strict)
    if len(train.classes) < 2:
        raise UserError(
            f"{folder} holds one class folder only, {train.classes[0]}: a classifier needs at least two, "
            "so write the folder above the class folders as --data.root."
        )
    validation = folder.parent / "val"
    if folder == root or not validation.is_dir():
        return train, None
    return train, scan(validation, train.classes, strict=strict)


def _training_folder(root: Path | None) -> Path:
    """The folder that holds the class folders of the training images."""
    if root is None:
        raise UserError(f"No dataset was named: write --data.root /path/to/imagenet, a folder that holds {_LAYOUT}.")
    if not root.exists():
        raise UserError(f"The data root {root} does not exist: write a folder that holds {_LAYOUT} as --data.root.")
    if not root.is_dir():
        raise UserError(f"The data root {root} is a file: write the folder that holds {_LAYOUT} as --data.root.")
    if any(root.glob("train/*.tar")) or any(root.glob("train-*.tar")):
        raise UserError(f"The data root {root} holds tar shards: write --data.source shards.")
    folders = class_folders(root)
    if "train" in folders:
        return root / "train"
    if not folders and not any(root.iterdir()):
        raise UserError(f"The data root {root} is empty: write a folder that holds {_LAYOUT} as --data.root.")
    if "val" in folders:
        raise UserError(
            f"The data root {root} holds a folder val but no folder train: lay the images out as {_LAYOUT}."
        )
    if not folders:
        raise UserError(
            f"The data root {root} holds neither a folder train nor class folders: "
            f"lay the images out as {_LAYOUT}, or write another folder as --data.root."
        )
    return root


def read_class_list(path: Path) -> tuple[str, ...]:
    """The names in a class list, one per line; blank lines are passed over.

    Raises:
        UserError: the file cannot be read, is empty or names a class twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f"The class list {path} cannot be read ({reason}): "
            "write a text file with one class folder name per line as --data.class-list."
        ) from None
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise UserError(f"The class list {path} is empty: write one class folder name per line.")
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UserError(f"The class list {path} names {repeated[0]} twice: write each class folder name once.")
    return names
