"""CIFAR-10 in either of its published layouts: pickles (cifar-10-batches-py) or plain bytes
(cifar-10-batches-bin).

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. Both hold the same images in the
same
order: five training files and one of test images, each image 1024 red, 1024 green and 1024 blue values by
    rows.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pliant.data.index import Pixels
from pliant.errors import UserError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_SIDE = 32
_VALUES = 3 * _SIDE * _SIDE
_LAYOUT = "cifar-10-batches-py or cifar-10-batches-bin"

_Part = tuple[NDArray[np.uint8], NDArray[np.uint8]]  # values (N, 3072) and labels (N,) of one file


def open_cifar10(root: Path | None) -> tuple[Pixels, Pixels]:
    """Read the training and the test images.

    Args:
        root: the folder that holds `cifar-10-batches-py` or `cifar-10-batches-bin`, or one of these itself.

    Raises:
        UserError: neither is there, or a file is missing or damaged.
    """
    folder, suffix, read = _layout(root)
    return (
        _join([read(folder / (name + suffix)) for name in _TRAIN]),
        _join([read(folder / ("test_batch" + suffix))]),
    )


def _layout(root: Path | None) -> tuple[Path, str, Callable[[Path], _Part]]:
    if root is None:
        raise UserError(f"No dataset was named: write --data.root /path/to/cifar10, a folder that holds {_LAYOUT}.")
    for folder in (root / "cifar-10-batches-bin", root / "cifar-10-batches-py", root):
        if (folder / "data_batch_1.bin").is_file():
            return folder, ".bin", _read_bytes
        if (folder / "data_batch_1").is_file():
            return folder, "", _read_pickle
    raise UserError(f"CIFAR-10 is not in {root}: write a folder that holds {_LAYOUT} as --data.root.")


def _join(parts: list[_Part]) -> Pixels:
    values = np.concatenate([part for part, _ in parts]).reshape(-1, 3, _SIDE, _SIDE)
    labels = np.concatenate([part for _, part in parts]).astype(np.int32)
    return Pixels(np.ascontiguousarray(values.transpose(0, 2, 3, 1)), labels, CLASSES)


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"The CIFAR-10 file {path} cannot be read ({reason}): unpack the dataset again.")


def _read_bytes(path: Path) -> _Part:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    if not content.size or content.size % (1 + _VALUES):
        raise _damaged(path, f"{content.size} bytes are no whole number of images")
    records = content.reshape(-1, 1 + _VALUES)
    return _checked(path, records[:, 1:], records[:, 0])


def _read_pickle(path: Path) -> _Part:
    try:
        with open(path, "rb") as file:
            entries = _Unpickler(file, encoding="latin1").load()
        values, labels = entries["data"], np.array(entries["labels"], np.uint8)
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    except Exception as error:  # a damaged pickle may raise anything
        raise _damaged(path, error) from None
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.shape != (len(labels), _VALUES):
        raise _damaged(path, f"it holds no array of images of {_VALUES} values")
    return _checked(path, values, labels)


def _checked(path: Path, values: NDArray[np.uint8], labels: NDArray[np.uint8]) -> _Part:
    if labels.max() >= len(CLASSES):
        raise _damaged(path, f"it holds a label {labels.max()}")
    return values, labels


class _Unpickler(pickle.Unpickler):
    """Reads arrays, numbers and text; a pickle that calls for anything else is refused before that is
    imported."""

    # The function that rebuilds arrays is private and has moved between releases of NumPy: ask an array for
    # it.
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
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-10 does not need") from None
