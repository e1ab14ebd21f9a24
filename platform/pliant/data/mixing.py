"""mixup and CutMix: each image of a micro-batch is mixed with the one as far from the end as it is from the start.

As timm's `Mixup` does in its mode `batch`: one share and one box for all images of a micro-batch, the share corrected
to the box where the border cuts it off. timm draws from NumPy's global generator; here the draws come from one that is
handed in, so what is done to the images is written out. Labels are mixed by timm's function.

mixup: Zhang et al. 2018, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899.

Shapes: B images of the micro-batch, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from pliant.augmentation import Augmentation
from pliant.torchvision_cpu import make_importable


@dataclass(frozen=True)
class Mixing:
    """How much of each image of a micro-batch stays its own."""

    share: float = 1.0
    """In [0, 1], of the image and of its label; 1 mixes nothing."""
    box: tuple[int, int, int, int] | None = None
    """CutMix: top, bottom, left and right of what comes from the other image. None: both are blended."""


def drawn_mixing(size: int, settings: Augmentation, generator: np.random.Generator) -> Mixing:
    """The mixing of one micro-batch of images of `size` pixels, where `settings.mixes`."""
    if generator.random() >= settings.mix_probability:
        return Mixing()
    both = settings.mixup > 0.0 and settings.cutmix > 0.0
    cut = generator.random() < settings.switch_probability if both else settings.cutmix > 0.0
    alpha = settings.cutmix if cut else settings.mixup
    share = float(generator.beta(alpha, alpha))
    if not cut:
        return Mixing(share)
    centre = generator.integers(size, size=2)
    top, bottom, left, right = box = _box(size, share, int(centre[0]), int(centre[1]))
    return Mixing(1.0 - (bottom - top) * (right - left) / (size * size), box)


def _box(size: int, share: float, y: int, x: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box around (y, x) that covers 1 - share of the image, cut off at its border."""
    side = int(size * math.sqrt(1.0 - share))
    low, high = side // 2, (side + 1) // 2
    return max(y - low, 0), min(y + high, size), max(x - low, 0), min(x + high, size)


def mix_(images: Tensor, mixing: Mixing) -> None:
    """Mixes images in place: float, (B, 3, H, W). With an odd B the one in the middle stays as it is."""
    if mixing.share == 1.0:
        return
    if mixing.box is None:
        others = images.flip(0).mul_(1.0 - mixing.share)
        images.mul_(mixing.share).add_(others)
        return
    top, bottom, left, right = mixing.box
    inside = images[:, :, top:bottom, left:right]
    inside.copy_(inside.flip(0))


def mixed_targets(labels: Tensor, classes: int, mixing: Mixing) -> Tensor:
    """The share of each class in each mixed image, float32, (B, K), from its labels, int64, (B,)."""
    targets: Tensor = timm_mixup().mixup_target(labels, classes, mixing.share)
    return targets


@cache
def timm_mixup() -> Any:
    """timm's module; slow to import."""
    make_importable()
    return import_module("timm.data.mixup")
