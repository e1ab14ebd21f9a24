"""SVHN, house numbers cropped to single digits: train_32x32.mat, test_32x32.mat and extra_32x32.mat; or class folders.

Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", 2011. The files are MATLAB's,
version 5: X holds the images by (row, column, colour, image), y the digits, where 10 stands for the digit 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pliant.data.index import Pixels
from pliant.data.sources.class_folders import SIDE, are_there, open_class_folders
from pliant.errors import UserError, optional_import

CLASSES = tuple("0123456789")
TRAIN, TEST, EXTRA = "train_32x32.mat", "test_32x32.mat", "extra_32x32.mat"
LAYOUT = f"{TRAIN} and {TEST}, or train/DIGIT/*.png and test/DIGIT/*.png"


def open_svhn(root: Path | None, *, extra: bool) -> tuple[Pixels, Pixels]:
    """Read the training and the test images.

    Args:
        root: the folder that holds the files.
        extra: train on the 531,131 extra images as well, which come after the others.

    Raises:
        UserError: the files are not there or damaged, or the package that reads them is not installed.
    """
    if root is None:
        raise UserError(f"No dataset was named: write --data.root /path/to/svhn, a folder that holds {LAYOUT}.")
    if not (root / TRAIN).is_file() and are_there(root):
        if extra:
            raise UserError(f"{root} holds class folders, without SVHN's extra images: leave --data.extra out.")
        return open_class_folders(root, CLASSES)
    for name in (TRAIN, TEST, EXTRA) if extra else (TRAIN, TEST):
        if not (root / name).is_file():
            hint = ", or leave --data.extra out" if name == EXTRA else ""
            raise UserError(
                f"SVHN is not in {root}, where {name} is missing: write a folder that holds {LAYOUT} as "
                f"--data.root{hint}."
            )
    train, test = read_mat(root / TRAIN), read_mat(root / TEST)
    if extra:
        more = read_mat(root / EXTRA)
        images, labels = np.concatenate([train.images, more.images]), np.concatenate([train.labels, more.labels])
        train = Pixels(images, labels, CLASSES)
    return train, test


def read_mat(path: Path) -> Pixels:
    """The images and digits of one of SVHN's files.

    Raises:
        UserError: it is damaged, or SciPy is not installed.
    """
    scipy_io = optional_import("scipy.io", extra="mat", purpose=f"Reading {path.name}")
    try:
        entries = scipy_io.loadmat(path, variable_names=("X", "y"))
        images, digits = entries["X"], np.asarray(entries["y"]).reshape(-1)
    except KeyError as error:
        raise _damaged(path, f"it has no entry {error}") from None
    except OSError as error:
        raise _damaged(path, error.strerror or error) from None
    except Exception as error:  # a damaged file may raise anything
        raise _damaged(path, error) from None
    if images.dtype != np.uint8 or images.shape != (SIDE, SIDE, 3, len(digits)) or not len(digits):
        raise _damaged(path, f"X is no array of images of {SIDE} x {SIDE} pixels, one for each digit in y")
    if digits.min() < 1 or digits.max() > 10:
        raise _damaged(path, f"it holds the digits {digits.min()} to {digits.max()}, not 1 to 10")
    labels = (digits % 10).astype(np.int32)
    return Pixels(np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels, CLASSES)


def _damaged(path: Path, reason: object) -> UserError:
    text = " ".join(str(reason).split()).rstrip(".")
    return UserError(f"The SVHN file {path} cannot be read ({text}): fetch it again.")
