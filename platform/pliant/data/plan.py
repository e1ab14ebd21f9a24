"""What becomes of each image of a batch, drawn before a byte of it is decoded.

A plan says, for every image: cut this window out of the stored image, resize it to that height and width, cut
a square out of the result, mirror it or not, put it through these operations, change its colours by these
factors, erase this rectangle, and mix it with another. Loaders carry the first part out and `Finish` the second,
so all loaders give the same of the same image, and a plan is a pure function of the key that it is drawn from.

Shapes: B images of the batch. Heights come before widths, tops before lefts; all in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pliant.data.erasing import Erasing, drawn_erasing
from pliant.data.mixing import Mixing, drawn_mixing
from pliant.data.policies import Operations, autoaugment, randaugment
from pliant.images import Data

Draws = Callable[[str], np.random.Generator]
"""The generator of a purpose ("crop", "flip", "operations", "jitter", "lighting", "erasing", "mixing"): one each, so
that switching one kind of augmentation on or off leaves the draws of the others alone."""

PAD = 4
"""Black pixels that a padded crop may take in on each side, as He et al. do on CIFAR-10."""
_ENORMOUS = 1 << 24  # pixels of a resized image, of 3 bytes each
_TRIES = 10  # windows drawn before a random resized crop falls back to the centre, as in torchvision
_ASPECTS = (3 / 4, 4 / 3)
_OWN_POLICIES = {"cifar10": "cifar10", "cifar100": "cifar10", "svhn": "svhn"}  # other sources: ImageNet's


@dataclass(frozen=True, eq=False)
class Plan:
    """What becomes of B images."""

    window: NDArray[np.int32]
    """(B, 4): top, left, height and width, inside the stored image."""
    resized: NDArray[np.int32]
    """(B, 2): height and width that the window is resized to."""
    offset: NDArray[np.int32]
    """(B, 2): top and left of the square in the resized window. It may begin before it (negative) and end
    after it: what lies outside is black."""
    size: int
    """Side of the square that is fed to the network."""
    flip: NDArray[np.bool_]
    """(B,): mirror left and right."""
    jitter: NDArray[np.float32] | None = None
    """(B, 3): factors of brightness, contrast and saturation; None: colours stay as they are."""
    lighting: NDArray[np.float32] | None = None
    """(B, 3): amounts of the principal components of colour, in units of their eigenvalues; None: none."""
    operations: Operations | None = None
    """What each mirrored image goes through before its colours change; None: nothing."""
    erasing: Erasing | None = None
    """Rectangles erased from the normalised images; None: none."""
    mixing: Mixing | None = None
    """How the images are then mixed with each other, and their labels too; None: labels stay what they are."""

    def __len__(self) -> int:
        return len(self.flip)

    def part(self, images: slice | NDArray[np.int64]) -> Plan:
        """The plan of some of the images, each for itself: what is mixed is a whole batch."""
        return Plan(
            window=self.window[images],
            resized=self.resized[images],
            offset=self.offset[images],
            size=self.size,
            flip=self.flip[images],
            jitter=None if self.jitter is None else self.jitter[images],
            lighting=None if self.lighting is None else self.lighting[images],
            operations=None if self.operations is None else self.operations.part(images),
            erasing=None if self.erasing is None else self.erasing.part(images),
        )


def training_plan(sizes: NDArray[np.int32], data: Data, draws: Draws) -> Plan:
    """Random resized crops and all that follows but mixing, for images of these stored sizes, (B, 2).

    The windows follow torchvision's RandomResizedCrop: area uniform in `data.scale`, aspect log-uniform in
    3/4 to 4/3, ten tries, else the largest centred window with a permitted aspect.
    """
    images = len(sizes)
    return Plan(
        window=_random_windows(sizes, data.scale, draws("crop")),
        resized=np.full((images, 2), data.size, np.int32),
        offset=np.zeros((images, 2), np.int32),
        size=data.size,
        flip=_flips(images, data, draws),
        jitter=_jitter(images, data, draws),
        lighting=_lighting(images, data, draws),
        operations=_operations(images, data.size, data, draws),
        erasing=_erasing(images, data.size, data, draws),
    )


def centre_plan(sizes: NDArray[np.int32], data: Data) -> Plan:
    """What torchvision's Resize(shorter side) and CenterCrop(data.size) do to images of these sizes, (B, 2).

    Of an image so narrow that it would grow to an enormous one, only what the square needs is resized.
    """
    shorter = round(data.size / 0.875) if data.resize is None else data.resize
    short = sizes.min(axis=1, keepdims=True).astype(np.int64)
    resized = np.where(sizes == short, shorter, (shorter * sizes.astype(np.int64) / short).astype(np.int64))
    excess = resized - data.size
    # CenterCrop rounds halves to even where it cuts, and down where it pads.
    offset = np.where(excess >= 0, np.rint(excess / 2), -(-excess // 2))
    plan = Plan(
        window=_whole(sizes),
        resized=resized.astype(np.int32),
        offset=offset.astype(np.int32),
        size=data.size,
        flip=np.zeros(len(sizes), np.bool_),
    )
    return _without_far_ends(plan, shorter) if (resized.prod(axis=1) > _ENORMOUS).any() else plan


def _without_far_ends(plan: Plan, shorter: int) -> Plan:
    """A centre plan that leaves out what lies far from the square, where all would be resized to an enormous image.

    Whole squares of the shorter side are kept, one at least on each side of what is fed: so the scale stays what it
    is, and what lies further off reaches no pixel of it. The square moves by half a pixel at most.
    """
    sizes, resized = plan.window[:, 2:].astype(np.int64), plan.resized.astype(np.int64)
    short = sizes.min(axis=1, keepdims=True)
    extent = np.minimum(sizes, (-(-plan.size // shorter) + 3) * short)
    cut = (extent < sizes) & (resized.prod(axis=1, keepdims=True) > _ENORMOUS)
    extent = np.where(cut, extent, sizes)
    corner = (sizes - extent) // 2
    middle = (resized - plan.size) / 2 - corner * shorter / short
    return replace(
        plan,
        window=np.concatenate([corner, extent], axis=1).astype(np.int32),
        resized=np.where(cut, extent * shorter // short, resized).astype(np.int32),
        offset=np.where(cut, np.rint(middle), plan.offset).astype(np.int32),
    )


def padded_plan(images: int, side: int, data: Data, draws: Draws) -> Plan:
    """Random crops of square images of `side` pixels that a border of PAD black pixels surrounds, if `data` says so;
    mirroring, operations and erasing."""
    most = PAD if data.padded_crop else 0
    return replace(
        whole_plan(images, side),
        offset=draws("crop").integers(-most, most, (images, 2), endpoint=True).astype(np.int32),
        flip=_flips(images, data, draws),
        operations=_operations(images, side, data, draws),
        erasing=_erasing(images, side, data, draws),
    )


def mixed_plan(plan: Plan, data: Data, draws: Draws) -> Plan:
    """The plan, its images mixed with each other if `data` says so.

    In training alone. Calibration augments each image as in training but mixes none: the statistics are those of
    images of one class each, which are what is evaluated, and a blend of two images varies less than either.
    """
    return replace(plan, mixing=drawn_mixing(plan.size, data, draws("mixing"))) if data.mixes else plan


def whole_plan(images: int, side: int) -> Plan:
    """Square images of `side` pixels as they are."""
    sizes = np.full((images, 2), side, np.int32)
    return Plan(_whole(sizes), sizes, np.zeros((images, 2), np.int32), side, np.zeros(images, np.bool_))


def _whole(sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1)


def _random_windows(
    sizes: NDArray[np.int32], scale: tuple[float, float], generator: np.random.Generator
) -> NDArray[np.int32]:
    images = len(sizes)
    shares = generator.uniform(*scale, (images, _TRIES))
    aspects = np.exp(generator.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1]), (images, _TRIES)))
    places = generator.random((images, 2))
    area = shares * sizes.astype(np.int64).prod(axis=1)[:, None]
    tries = np.rint(np.sqrt(np.stack([area / aspects, area * aspects], axis=2))).astype(np.int64)  # (B, tries, 2)
    fits = ((tries > 0) & (tries <= sizes[:, None])).all(axis=2)
    drawn = tries[np.arange(images), fits.argmax(axis=1)]
    found = fits.any(axis=1)[:, None]
    extent = np.where(found, drawn, _fallback(sizes))
    room = sizes - extent
    corner = np.where(found, np.floor(places * (room + 1)), room // 2)
    return np.concatenate([corner, extent], axis=1).astype(np.int32)


def _fallback(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """(B, 2): the largest height and width of a permitted aspect; the whole image where its own is permitted."""
    height, width = sizes.astype(np.int64).T
    aspect = width / height
    lowest, highest = _ASPECTS
    return np.stack(
        [
            np.where(aspect < lowest, np.rint(width / lowest).astype(np.int64), height),
            np.where(aspect > highest, np.rint(height * highest).astype(np.int64), width),
        ],
        axis=1,
    )


def _flips(images: int, data: Data, draws: Draws) -> NDArray[np.bool_]:
    return draws("flip").random(images) < 0.5 if data.mirrors else np.zeros(images, np.bool_)


def _jitter(images: int, data: Data, draws: Draws) -> NDArray[np.float32] | None:
    if not data.jitter:
        return None
    return draws("jitter").uniform(1 - data.jitter, 1 + data.jitter, (images, 3)).astype(np.float32)


def _lighting(images: int, data: Data, draws: Draws) -> NDArray[np.float32] | None:
    if not data.lighting:
        return None
    return (data.lighting * draws("lighting").standard_normal((images, 3))).astype(np.float32)


def _operations(images: int, size: int, data: Data, draws: Draws) -> Operations | None:
    if data.augment == "none":
        return None
    generator = draws("operations")
    if data.augment == "randaugment":
        return randaugment(images, size, data, generator)
    policy = _OWN_POLICIES.get(data.source, "imagenet") if data.augment_policy == "auto" else data.augment_policy
    return autoaugment(images, size, data, policy, generator)


def _erasing(images: int, size: int, data: Data, draws: Draws) -> Erasing | None:
    return drawn_erasing(images, size, data, draws("erasing")) if data.erasing else None
