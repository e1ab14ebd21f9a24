"""The splits of a dataset: what trains, what is held out of training to choose by, what validates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pliant.data.faults import check_known, note
from pliant.data.index import Fingerprint, Index, Split
from pliant.data.sources.cifar10 import open_cifar10
from pliant.data.sources.cifar100 import open_cifar100
from pliant.data.sources.folder import open_folder
from pliant.data.sources.shards import open_shards
from pliant.data.sources.svhn import open_svhn
from pliant.errors import UserError
from pliant.images import Data
from pliant.randomness import philox

SplitName = Literal["train", "held_out", "val"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """The images of a run, not yet decoded."""

    train: Split
    """What a run learns from, without the images held out."""
    held_out: Split | None
    """Training images kept back; None where `data.held_out` is 0."""
    val: Split | None
    """Validation images, the test images of CIFAR and SVHN; None where there are none."""
    classes: tuple[str, ...]
    """Names of the classes, in the order of the labels."""
    num_classes: int
    """Outputs that a network needs: `data.classes`, or as many as there are names."""
    generated: bool = False
    """Rendered by data/generate_sample.py, not photographed: said wherever a result is shown."""

    def split(self, name: SplitName) -> Split:
        """The images of one split.

        Raises:
            UserError: there are none.
        """
        split: Split | None = getattr(self, name)
        if split is not None:
            return split
        raise UserError(
            "No training images are held out: write for instance --data.held-out 1000."
            if name == "held_out"
            else "The dataset has no validation images: add a folder val beside train, or write --data.held-out 1000."
        )

    def fingerprints(self) -> dict[str, Fingerprint]:
        """That of each split there is, by what a person calls its images."""
        splits = {"training": self.train, "held-out": self.held_out, "validation": self.val}
        return {name: split.fingerprint for name, split in splits.items() if split is not None}

    def notes(self) -> list[str]:
        """What a person should know of images found broken when they were indexed."""
        splits = (("training", self.train, True), ("held-out", self.held_out, False), ("validation", self.val, False))
        found = [note(name, split, replaced=replaced) for name, split, replaced in splits if isinstance(split, Index)]
        return [text for text in found if text is not None]


def open_dataset(data: Data, seed: int) -> Dataset:
    """Find the images that `data` describes.

    Args:
        data: where they lie.
        seed: of the run: it draws the images held out.

    Raises:
        UserError: they are not there, not laid out as expected or not readable; `data.classes` is smaller
            than the number of classes found; `data.held_out` leaves nothing to train on; too many images are broken.
    """
    train: Split
    val: Split | None
    if data.source == "cifar10":
        train, val = open_cifar10(data.root)
    elif data.source == "cifar100":
        train, val = open_cifar100(data.root)
    elif data.source == "svhn":
        train, val = open_svhn(data.root, extra=data.extra)
    else:
        open_files = open_shards if data.source == "shards" else open_folder
        train, val = open_files(data.root, data.class_list, strict=data.check == "strict")
    found = len(train.classes)
    if data.classes is not None and data.classes < found:
        raise UserError(
            f"The dataset in {data.root} has {found} classes, more than the {data.classes} asked for: "
            f"write --data.classes {found} or more."
        )
    held_out = None
    if data.held_out:
        kept_back = held_out_positions(train.labels, data.held_out, seed)
        trained = np.ones(len(train), np.bool_)
        trained[kept_back] = False
        held_out, train = train.subset(kept_back), train.subset(np.flatnonzero(trained))
    for split, replaced in ((train, True), (held_out, False), (val, False)):
        if isinstance(split, Index):
            check_known(split, data.broken_share, replaced=replaced)
    generated = data.root is not None and (data.root / "sample.json").is_file()
    return Dataset(train, held_out, val, train.classes, data.classes or found, generated)


def held_out_positions(labels: NDArray[np.int32], number: int, seed: int) -> NDArray[np.int64]:
    """A fixed draw of positions, sorted, with as many images of each class as far as there are.

    Raises:
        UserError: `number` leaves nothing to train on.
    """
    images = len(labels)
    if number >= images:
        raise UserError(
            f"Of {images} training images {number} cannot be held out, as none would be left to train on: "
            f"write --data.held-out {images // 10} or another number below {images}."
        )
    generator = philox(seed, "held-out")
    shuffled = generator.permutation(images)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first = np.unique(labels[by_class], return_index=True)
    lengths = np.diff(np.append(first, images))
    rank_in_class = np.arange(images) - np.repeat(first, lengths)
    # Round by round one image of each class, the classes of the last, unfinished round by lot.
    taken = np.lexsort((generator.random(images), rank_in_class))[:number]
    return np.sort(by_class[taken])
