"""Which images a run is fed, and how: the part of an experiment that `data/` reads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pliant.augmentation import Augmentation
from pliant.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Data(Augmentation):
    """Which images, and how they are fed."""

    source: Literal["folder", "shards", "cifar10", "cifar100", "svhn"] = "folder"
    """folder: ROOT/train/CLASS/FILE and ROOT/val/CLASS/FILE. shards: tar files, ROOT/train/*.tar and ROOT/val/*.tar or
    ROOT/train-*.tar and ROOT/val-*.tar, with CLASS/FILE or with KEY.jpg beside KEY.cls. cifar10, cifar100 (fine
    classes), svhn: the dataset's own files, or class folders of 32 x 32 images, held in memory."""
    root: Path | None = None
    """Where the dataset lies."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes images; auto is dali where it is installed (image folders and shards). Small datasets stay resident
    in memory."""
    size: int = 224
    """Height and width of the images fed to the network, in pixels (image folders and shards)."""
    resize: int | None = None
    """Shorter side that an image is resized to before the centre crop of validation, in pixels; default: size
    / 0.875 (image folders and shards)."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random resized crop covers, from and to (image folders and shards)."""
    jitter: float = 0.0
    """Colour jitter: brightness, contrast and saturation are each multiplied by 1 ± this (image folders and shards)."""
    lighting: float = 0.0
    """Standard deviation of the PCA lighting noise, in units of AlexNet's eigenvalues (image folders and shards)."""
    statistics: Literal["dataset", "imagenet"] = "dataset"
    """Mean and deviation that colours are normalised by. dataset: of CIFAR or SVHN; of ImageNet for image folders and
    shards, whatever they hold. imagenet: ImageNet's everywhere, for weights trained so."""
    flip: bool = True
    """Mirror each training image with probability 1/2; never SVHN's, as a mirrored digit is no digit."""
    padded_crop: bool = True
    """Cut each training image at random out of itself and a border of 4 black pixels; SkipNet's paper leaves SVHN's
    images as they are (small datasets)."""
    extra: bool = False
    """Train on SVHN's 531,131 extra images as well."""
    held_out: int = 0
    """Training images kept back, a fixed draw: followed in validation, and by them the best checkpoint is
    chosen. 0 trains on all images and follows the validation images, without choosing by them."""
    classes: int | None = None
    """Number of outputs of the network; default: the classes found."""
    class_list: Path | None = None
    """Text file with one class name per line, in the order of the labels, where not all classes are present (image
    folders and shards); default: the names found, sorted; for numbered shards ROOT/classes.txt, if it is there."""
    check: Literal["strict", "header"] = "strict"
    """What is done to each image when it is indexed, once. strict: it is read, decoded and given a checksum, so that a
    broken one is known from the start and a changed one is noticed. header: only its size is read, which is faster;
    broken images are then found while training, if the decoder notices: DALI does not see damage below the window that
    it cuts out (image folders and shards)."""
    broken_share: float = 0.01
    """Share of a split's images that may be broken: more than that, and more than 10, end the run. Others of their
    class stand in for them in training; in validation they are left out (image folders and shards)."""
    threads: int = 2
    """Decoding threads of each rank."""
    prefetch: int = 2
    """Micro-batches prepared ahead."""
    replay: bool = False
    """Feed the first micro-batch again and again: the speed without a loader. For measuring only."""
    tail: Literal["drop", "wrap"] = "drop"
    """What becomes of the training images that are left when an epoch's order is cut into global batches.
    drop: they sit this epoch out, others the next. wrap: they open a last step that goes on with the epoch's
    first images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest, highest = self.scale
        if not 0.0 < lowest <= highest <= 1.0:
            raise UserError(
                f"A random resized crop cannot cover {lowest:g} to {highest:g} of an image: "
                "write two numbers above 0 and up to 1 as --data.scale, the smaller first."
            )
        if not 0.0 <= self.jitter <= 1.0:
            raise UserError(
                f"Colour jitter lies between 0 and 1, not {self.jitter:g}: write for instance --data.jitter 0.4."
            )
        if not 0.0 <= self.lighting < math.inf:
            raise UserError(f"Lighting noise cannot have the deviation {self.lighting:g}: write 0 or more.")
        if not 0.0 <= self.broken_share <= 1.0:
            raise UserError(
                f"A share lies between 0 and 1, not {self.broken_share:g}: write for instance --data.broken-share 0.01."
            )
        least_values = dict(size=1, resize=1, held_out=0, classes=2, threads=1, prefetch=1)
        for name, least in least_values.items():
            value: int | None = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--data.{name.replace('_', '-')} cannot be {value}: write {least} or more.")
        if self.extra and self.source != "svhn":
            raise UserError(f"Only SVHN has extra images, not {self.source}: leave --data.extra out.")

    @property
    def mirrors(self) -> bool:
        """Whether training images are mirrored."""
        return self.flip and self.source != "svhn"

    @property
    def of_files(self) -> bool:
        """Whether images are decoded from files; a small dataset's stay in memory, 32 x 32."""
        return self.source in ("folder", "shards")

    @property
    def side(self) -> int:
        """Height and width of the images that a network is fed, in pixels."""
        return self.size if self.of_files else 32

    def at_size(self, size: int) -> Data:
        """The same images at another size; in validation as much of each is cut off as before.

        Raises:
            UserError: they have one size.
        """
        if not self.of_files:
            raise UserError(f"The images of {self.source} are fed as they are, 32 x 32 pixels: leave --size out.")
        if size < 1:
            raise UserError(f"Images of {size} pixels cannot be: write --size 1 or more.")
        resize = None if self.resize is None else max(1, round(self.resize * size / self.size))
        return dataclasses.replace(self, size=size, resize=resize)

    def refuse_idle(self) -> None:
        """Refuses what would have nothing to say. Asked of new runs alone: older ones may hold such settings.

        Raises:
            UserError: a setting is of images in files and the source's stay in memory as they are, or the other way.
        """
        if self.of_files:
            if not self.padded_crop:
                raise UserError(
                    f"--data.source {self.source} has no padded crops, but random resized ones: leave "
                    "--data.no-padded-crop out, or write --data.scale 1 1."
                )
            return
        idle = next((name for name in _OF_FILES if self._is_set(name)), None)
        if idle is not None:
            raise UserError(
                f"--data.source {self.source} has no use for --data.{idle.replace('_', '-')}, as its images stay in "
                "memory as they are: leave it out."
            )


_OF_FILES = ("loader", "size", "resize", "scale", "jitter", "lighting", "class_list", "check", "broken_share")
"""Settings of image folders and shards alone."""
