"""CIFAR's two published forms, pickles and plain bytes, which CIFAR-10 and CIFAR-100 share.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Both forms hold the same images in the same
order, each image 1024 red, 1024 green and 1024 blue values by rows.

Shapes: N images of a file.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.data.index import Pixels
from pliant.data.sources.class_folders import SIDE, are_there, open_class_folders
from pliant.errors import UserError

_VALUES = 3 * SIDE * SIDE

_Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # values (N, 3072) and labels (N,) of one file


@dataclass(frozen=True)
class Form:
    """What one CIFAR dataset calls its folders and files."""

    title: str
    """Its name in sentences."""
    source: str
    """Its name as `data.source`."""
    binary: str
    """Folder of the plain bytes; their files end in .bin."""
    pickled: str
    """Folder of the pickles."""
    train: tuple[str, ...]
    """Files of the training images, without their ending."""
    test: str
    """File of the test images, without its ending."""
    label_bytes: int
    """Bytes before the values of an image in the binary files; the last of them is the class."""
    label_key: str
    """Under which a pickle keeps the classes."""
    classes: int
    """How many there are."""

    @property
    def layout(self) -> str:
        """What a user is told to look for."""
        return f"{self.pickled} or {self.binary}, or train/CLASS/*.png and test/CLASS/*.png"


def open_cifar(form: Form, root: Path | None, names: Sequence[str]) -> tuple[Pixels, Pixels]:
    """Read the training and the test images.

    Args:
        form: which dataset.
        root: the folder that holds one of the form's folders, or one of these itself, or class folders.
        names: of the classes, in the order of the labels.

    Raises:
        UserError: no images are there, or a file is missing or damaged.
    """
    if root is None:
        raise UserError(
            f"No dataset was named: write --data.root /path/to/{form.source}, a folder that holds {form.layout}."
        )
    folder = find_folder(form, root)
    if folder is None and are_there(root):
        return open_class_folders(root, names)
    if folder is None:
        raise UserError(f"{form.title} is not in {root}: write a folder that holds {form.layout} as --data.root.")
    return _join(form, folder, form.train, names), _join(form, folder, (form.test,), names)


def find_folder(form: Form, root: Path) -> Path | None:
    """The folder that holds the dataset's own files: `root`, or one in it; None where there is none."""
    for folder in (root / form.binary, root / form.pickled, root):
        if (folder / f"{form.train[0]}.bin").is_file() or (folder / form.train[0]).is_file():
            return folder
    return None


def read_pickle(path: Path, form: Form) -> dict[str, Any]:
    """The entries of one of the dataset's pickles; nothing in it is run.

    Raises:
        UserError: it cannot be read, or asks for more than arrays, numbers and text.
    """
    try:
        with open(path, "rb") as file:
            entries = _Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise damaged(form, path, error.strerror) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise damaged(form, path, error) from None
    if not isinstance(entries, dict):
        raise damaged(form, path, "it holds no table")
    return entries


def damaged(form: Form, path: Path, reason: object) -> UserError:
    """The sentence for a file of the dataset that cannot be read."""
    return UserError(f"The {form.title} file {path} cannot be read ({reason}): unpack the dataset again.")


def _join(form: Form, folder: Path, files: Sequence[str], names: Sequence[str]) -> Pixels:
    binary = (folder / f"{form.train[0]}.bin").is_file()
    parts = [
        _read_bytes(form, folder / f"{file}.bin") if binary else _read_entries(form, folder / file) for file in files
    ]
    values = np.concatenate([part for part, _ in parts]).reshape(-1, 3, SIDE, SIDE)
    labels = np.concatenate([part for _, part in parts]).astype(np.int32)
    return Pixels(np.ascontiguousarray(values.transpose(0, 2, 3, 1)), labels, tuple(names))


def _read_bytes(form: Form, path: Path) -> _Part:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise damaged(form, path, error.strerror) from None
    length = form.label_bytes + _VALUES
    if not content.size or content.size % length:
        raise damaged(form, path, f"{content.size} bytes are no whole number of images")
    records = content.reshape(-1, length)
    return _checked(form, path, records[:, form.label_bytes :], records[:, form.label_bytes - 1])


def _read_entries(form: Form, path: Path) -> _Part:
    entries = read_pickle(path, form)
    try:
        values, labels = entries["data"], np.array(entries[form.label_key], np.uint8)
    except KeyError as error:
        raise damaged(form, path, f"it has no entry {error}") from None
    except Exception as error:  # what stands there may be anything
        raise damaged(form, path, error) from None
    shape = (len(labels) if labels.ndim else 0, _VALUES)
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.shape != shape or not len(values):
        raise damaged(form, path, f"it holds no array of images of {_VALUES} values")
    return _checked(form, path, values, labels)


def _checked(form: Form, path: Path, values: NDArray[np.uint8], labels: NDArray[np.uint8]) -> _Part:
    if labels.max() >= form.classes:
        raise damaged(form, path, f"it holds a label {labels.max()}")
    return values, labels


class _Unpickler(pickle.Unpickler):
    """Reads arrays, numbers and text; a pickle that calls for anything else is refused before that is imported."""

    # The function that rebuilds arrays is private and has moved between releases of NumPy: ask an array for it.
    _rebuild: Any = np.empty(0).__reduce__()[0]
    _allowed: dict[tuple[str, str], Any] = {  # noqa: RUF012 - read only
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _rebuild,
        ("numpy._core.multiarray", "_reconstruct"): _rebuild,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR does not need") from None
