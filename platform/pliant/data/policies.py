"""Which operations each image goes through, and how strongly, by RandAugment or AutoAugment.

Both as torchvision has them: the same operations, magnitudes and probabilities. Only the draws differ: all images of
a batch at once, from a generator that is handed in.

RandAugment: Cubuk et al. 2020, arXiv 1909.13719. AutoAugment: Cubuk et al. 2019, arXiv 1805.09501.

Shapes: B images of the batch, N operations of each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from pliant.augmentation import Augmentation

_SIGNED = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
)
OPERATIONS = ("Identity", *_SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")
"""By the names that torchvision gives them; RandAugment draws from all but the last."""

_RANDAUGMENT_BINS = 31
_AUTOAUGMENT_BINS = 10


@dataclass(frozen=True, eq=False)
class Operations:
    """What B images go through, from the first column to the last."""

    kind: NDArray[np.int8]
    """(B, N): a place in OPERATIONS. What a draw says not to apply is Identity."""
    magnitude: NDArray[np.float32]
    """(B, N), signed: slope of a shear, pixels of a translation, degrees of a rotation; what is added to a factor of 1
    for brightness, colour, contrast and sharpness; bits kept by Posterize; share of the full scale from which Solarize
    inverts; 0 for all others."""
    fill: tuple[int, int, int]
    """Red, green and blue, 0 to 255, of what an operation uncovers."""

    def part(self, images: slice | NDArray[np.int64]) -> Operations:
        """Those of some of the images."""
        return replace(self, kind=self.kind[images], magnitude=self.magnitude[images])


def randaugment(images: int, size: int, settings: Augmentation, generator: np.random.Generator) -> Operations:
    """Operations drawn alike and apart from each other, all of the magnitude that is set.

    Args:
        images: B.
        size: side of the images, in pixels.
        settings: number of operations, magnitude and fill.
        generator: draws.
    """
    shape = (images, settings.augment_ops)
    kind = generator.integers(OPERATIONS.index("Invert"), size=shape).astype(np.int8)
    magnitude = magnitudes(_RANDAUGMENT_BINS, size)[kind, settings.augment_magnitude]
    return Operations(kind, _signed(kind, magnitude, generator), settings.augment_fill)


def autoaugment(
    images: int, size: int, settings: Augmentation, policy: str, generator: np.random.Generator
) -> Operations:
    """For each image one of a policy's pairs of operations, each applied with the pair's own probabilities.

    Args:
        images: B.
        size: side of the images, in pixels.
        settings: fill.
        policy: imagenet, cifar10 or svhn.
        generator: draws.
    """
    kinds, probabilities, levels = _policy(policy)
    pair = generator.integers(len(kinds), size=images)
    applied = generator.random((images, 2)) < probabilities[pair]
    kind = np.where(applied, kinds[pair], OPERATIONS.index("Identity")).astype(np.int8)
    magnitude = magnitudes(_AUTOAUGMENT_BINS, size)[kind, levels[pair]]
    return Operations(kind, _signed(kind, magnitude, generator), settings.augment_fill)


@cache
def magnitudes(bins: int, size: int) -> NDArray[np.float32]:
    """(operations, bins): the unsigned magnitude of each operation at each level, for images of `size` pixels.

    Rounded in float32 as torchvision's are: a translation is cut down to whole pixels, where a last bit may decide.
    """
    largest = dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), 0.9)
    largest |= {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0}
    largest |= dict.fromkeys(("TranslateX", "TranslateY"), 150.0 / 331.0 * size)
    table = torch.zeros(len(OPERATIONS), bins)
    for name, value in largest.items():
        table[OPERATIONS.index(name)] = torch.linspace(0.0, value, bins)
    table[OPERATIONS.index("Posterize")] = (8 - torch.arange(bins) / ((bins - 1) / 4)).round()
    table[OPERATIONS.index("Solarize")] = torch.linspace(1.0, 0.0, bins)
    return table.numpy()


def _signed(
    kind: NDArray[np.int8], magnitude: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.float32]:
    """The magnitudes, half of those that have a direction turned round."""
    turned = (generator.random(kind.shape) < 0.5) & np.isin(kind, [OPERATIONS.index(name) for name in _SIGNED])
    return np.where(turned, -magnitude, magnitude)


@cache
def _policy(name: str) -> tuple[NDArray[np.int8], NDArray[np.float64], NDArray[np.int64]]:
    """(pairs, 2) each: operations, probabilities and levels of a policy."""
    pairs = [line.split(",") for line in _POLICIES[name].strip().splitlines()]
    words = [[(*operation.split(), "0")[:3] for operation in pair] for pair in pairs]
    return (
        np.array([[OPERATIONS.index(kind) for kind, _, _ in pair] for pair in words], np.int8),
        np.array([[float(probability) for _, probability, _ in pair] for pair in words]),
        np.array([[int(level) for _, _, level in pair] for pair in words]),
    )


# The tables of AutoAugment's appendix, a pair on each line: operation, probability, and level of its magnitude if any.
_POLICIES = {
    "imagenet": """
    Posterize 0.4 8, Rotate 0.6 9
    Solarize 0.6 5, AutoContrast 0.6
    Equalize 0.8, Equalize 0.6
    Posterize 0.6 7, Posterize 0.6 6
    Equalize 0.4, Solarize 0.2 4
    Equalize 0.4, Rotate 0.8 8
    Solarize 0.6 3, Equalize 0.6
    Posterize 0.8 5, Equalize 1
    Rotate 0.2 3, Solarize 0.6 8
    Equalize 0.6, Posterize 0.4 6
    Rotate 0.8 8, Color 0.4 0
    Rotate 0.4 9, Equalize 0.6
    Equalize 0, Equalize 0.8
    Invert 0.6, Equalize 1
    Color 0.6 4, Contrast 1 8
    Rotate 0.8 8, Color 1 2
    Color 0.8 8, Solarize 0.8 7
    Sharpness 0.4 7, Invert 0.6
    ShearX 0.6 5, Equalize 1
    Color 0.4 0, Equalize 0.6
    Equalize 0.4, Solarize 0.2 4
    Solarize 0.6 5, AutoContrast 0.6
    Invert 0.6, Equalize 1
    Color 0.6 4, Contrast 1 8
    Equalize 0.8, Equalize 0.6
    """,
    "cifar10": """
    Invert 0.1, Contrast 0.2 6
    Rotate 0.7 2, TranslateX 0.3 9
    Sharpness 0.8 1, Sharpness 0.9 3
    ShearY 0.5 8, TranslateY 0.7 9
    AutoContrast 0.5, Equalize 0.9
    ShearY 0.2 7, Posterize 0.3 7
    Color 0.4 3, Brightness 0.6 7
    Sharpness 0.3 9, Brightness 0.7 9
    Equalize 0.6, Equalize 0.5
    Contrast 0.6 7, Sharpness 0.6 5
    Color 0.7 7, TranslateX 0.5 8
    Equalize 0.3, AutoContrast 0.4
    TranslateY 0.4 3, Sharpness 0.2 6
    Brightness 0.9 6, Color 0.2 8
    Solarize 0.5 2, Invert 0
    Equalize 0.2, AutoContrast 0.6
    Equalize 0.2, Equalize 0.6
    Color 0.9 9, Equalize 0.6
    AutoContrast 0.8, Solarize 0.2 8
    Brightness 0.1 3, Color 0.7 0
    Solarize 0.4 5, AutoContrast 0.9
    TranslateY 0.9 9, TranslateY 0.7 9
    AutoContrast 0.9, Solarize 0.8 3
    Equalize 0.8, Invert 0.1
    TranslateY 0.7 9, AutoContrast 0.9
    """,
    "svhn": """
    ShearX 0.9 4, Invert 0.2
    ShearY 0.9 8, Invert 0.7
    Equalize 0.6, Solarize 0.6 6
    Invert 0.9, Equalize 0.6
    Equalize 0.6, Rotate 0.9 3
    ShearX 0.9 4, AutoContrast 0.8
    ShearY 0.9 8, Invert 0.4
    ShearY 0.9 5, Solarize 0.2 6
    Invert 0.9, AutoContrast 0.8
    Equalize 0.6, Rotate 0.9 3
    ShearX 0.9 4, Solarize 0.3 3
    ShearY 0.8 8, Invert 0.7
    Equalize 0.9, TranslateY 0.6 6
    Invert 0.9, Equalize 0.6
    Contrast 0.3 3, Rotate 0.8 4
    Invert 0.8, TranslateY 0 2
    ShearY 0.7 6, Solarize 0.4 8
    Invert 0.6, Rotate 0.8 4
    ShearY 0.3 7, TranslateX 0.9 3
    ShearX 0.1 6, Invert 0.6
    Solarize 0.7 2, TranslateY 0.6 7
    ShearY 0.8 4, Invert 0.8
    ShearX 0.7 9, TranslateY 0.8 3
    ShearY 0.8 5, AutoContrast 0.7
    ShearX 0.7 2, Invert 0.1
    """,
}
