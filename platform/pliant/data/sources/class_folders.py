"""CIFAR and SVHN with a file for each image, as many mirrors have them: ROOT/train/CLASS/*.png, ROOT/test/CLASS/*.png.

All of them are decoded once and stay in memory, like those of the original files.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pliant.data.index import SUFFIXES, Pixels, class_folders
from pliant.errors import UserError

SIDE = 32
"""Height and width of the images, in pixels."""
_READERS = 8  # threads that wait for storage; Pillow decodes without holding the interpreter


def are_there(root: Path) -> bool:
    """Whether `root` holds a folder train, and test or val."""
    return (root / "train").is_dir() and _test_folder(root).is_dir()


def open_class_folders(root: Path, names: Sequence[str]) -> tuple[Pixels, Pixels]:
    """Read the training and the test images.

    Args:
        root: holds the folders train, and test or val.
        names: the usual class names, in the order of the labels. Folders of these names get their labels; folders
            named by numbers alone are ordered as numbers, all others by name.

    Raises:
        UserError: a folder holds no images or cannot be read, a class of the test images is not among the training
            images, or a file is no image of 32 x 32 pixels.
    """
    found = class_folders(root / "train")
    if set(found) <= set(names):
        classes = tuple(names)
    else:
        numbered = all(name.isdecimal() for name in found)
        classes = tuple(sorted(found, key=int) if numbered else found)
    return _read(root / "train", classes), _read(_test_folder(root), classes)


def _test_folder(root: Path) -> Path:
    return root / "test" if (root / "test").is_dir() else root / "val"


def _read(folder: Path, classes: tuple[str, ...]) -> Pixels:
    found = class_folders(folder)
    numbers = {name: number for number, name in enumerate(classes)}
    strangers = [name for name in found if name not in numbers]
    if strangers:
        raise UserError(
            f"The class folder {folder / strangers[0]} is none of the {len(classes)} training classes: remove it."
        )
    files = [(path, numbers[name]) for name in found for path in _images(folder / name)]
    if not files:
        raise UserError(f"The folder {folder} holds no images: move them to {folder}/CLASS/FILE.png.")
    with ThreadPoolExecutor(_READERS) as readers:
        images = np.stack(list(readers.map(_decode, [path for path, _ in files])))
    return Pixels(images, np.array([label for _, label in files], np.int32), classes)


def _images(folder: Path) -> list[Path]:
    """The image files of a class folder. Where their names are numbers, as `12.png`, they are still sorted as text:
    any order will do that is always the same.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    except OSError as error:
        raise UserError(
            f"The class folder {folder} cannot be read ({error.strerror}): mend its permissions or remove it."
        ) from None


def _decode(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
    except Exception as error:  # a damaged file may raise anything
        unknown = isinstance(error, UnidentifiedImageError)
        why = "its format is unknown" if unknown else " ".join(str(error).split()).rstrip(".")
        raise UserError(f"The file {path} is no readable image ({why}): replace it or remove it.") from None
    if image.shape != (SIDE, SIDE, 3):
        raise UserError(
            f"The file {path} has {image.shape[1]} x {image.shape[0]} pixels where {SIDE} x {SIDE} are expected: "
            "write --data.source folder for images of other sizes."
        )
    return image
