"""CIFAR-10: five training files of 10,000 images and one of test images, in cifar-10-batches-py (pickles) or
cifar-10-batches-bin (plain bytes); or class folders."""

from __future__ import annotations

from pathlib import Path

from pliant.data.index import Pixels
from pliant.data.sources.cifar import Form, open_cifar

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FORM = Form(
    title="CIFAR-10",
    source="cifar10",
    binary="cifar-10-batches-bin",
    pickled="cifar-10-batches-py",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    label_bytes=1,
    label_key="labels",
    classes=10,
)


def open_cifar10(root: Path | None) -> tuple[Pixels, Pixels]:
    """Read the training and the test images.

    Args:
        root: the folder that holds `cifar-10-batches-py` or `cifar-10-batches-bin`, or one of these itself; or
            `train/CLASS/*.png` and `test/CLASS/*.png`.

    Raises:
        UserError: none of these is there, or a file is missing or damaged.
    """
    return open_cifar(FORM, root, CLASSES)
