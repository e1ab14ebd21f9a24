"""RandAugment's and AutoAugment's operations, carried out on a whole batch on the device that trains.

Images of one operation and magnitude go through torchvision's function together: RandAugment on 128 images is some 40
calls and 550 kernels, where one call for each image would be 250 and 3,000. Each function treats the images of a batch
apart from each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.data.policies import OPERATIONS, Operations
from pliant.torchvision_cpu import make_importable


def changed(images: Tensor, operations: Operations) -> Tensor:
    """The images after all their operations, uint8, (B, 3, H, W), channels last.

    Args:
        images: the same type, shape and order; may be written over.
        operations: of these images.
    """
    pixels = images.permute(0, 2, 3, 1).contiguous()
    for kinds, magnitudes in zip(operations.kind.T, operations.magnitude.T, strict=True):
        for kind, magnitude, members in _groups(kinds, magnitudes, pixels.device):
            some = pixels.index_select(0, members).permute(0, 3, 1, 2)
            after = apply(some, OPERATIONS[kind], magnitude, operations.fill)
            pixels.index_copy_(0, members, after.permute(0, 2, 3, 1))
    return pixels.permute(0, 3, 1, 2)


def _groups(
    kinds: NDArray[np.int8], magnitudes: NDArray[np.float32], device: torch.device
) -> Iterator[tuple[int, float, Tensor]]:
    """Operation, magnitude and images, int64 on the device, of each group; images left as they are belong to none."""
    order = np.lexsort((magnitudes, kinds))
    order = order[kinds[order] != OPERATIONS.index("Identity")]
    kinds, magnitudes = kinds[order], magnitudes[order]
    starts = np.flatnonzero((np.diff(kinds, prepend=-1) != 0) | (np.diff(magnitudes, prepend=np.nan) != 0))
    members = torch.from_numpy(order).to(device, non_blocking=True)  # one transfer for all groups
    for first, last in pairwise([*starts.tolist(), len(order)]):
        yield int(kinds[first]), float(magnitudes[first]), members[first:last]


def apply(images: Tensor, name: str, magnitude: float, fill: tuple[int, int, int]) -> Tensor:
    """What torchvision's RandAugment and AutoAugment do for one operation.

    Args:
        images: uint8, (B, 3, H, W), in any memory order.
        name: one of OPERATIONS.
        magnitude: as in `Operations`.
        fill: colour of what is uncovered.
    """
    F = functional()
    # torchvision computes black without a mask of what is uncovered.
    uncovered = dict(fill=list(fill) if any(fill) else None)
    still: dict[str, Any] = dict(angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0]) | uncovered
    match name:
        case "Identity":
            result = images
        case "ShearX":  # about the upper left corner, as the papers' code does
            result = F.affine(images, **still | dict(shear=[_degrees(magnitude), 0.0], center=[0, 0]))
        case "ShearY":
            result = F.affine(images, **still | dict(shear=[0.0, _degrees(magnitude)], center=[0, 0]))
        case "TranslateX":
            result = F.affine(images, **still | dict(translate=[int(magnitude), 0]))
        case "TranslateY":
            result = F.affine(images, **still | dict(translate=[0, int(magnitude)]))
        case "Rotate":
            result = F.rotate(images, magnitude, **uncovered)
        case "Brightness":
            result = F.adjust_brightness(images, 1.0 + magnitude)
        # Three that sum over colours or pixels get planes: over these a CPU is up to eight times as fast.
        case "Color":
            result = F.adjust_saturation(images.contiguous(), 1.0 + magnitude)
        case "Contrast":
            result = F.adjust_contrast(images.contiguous(), 1.0 + magnitude)
        case "AutoContrast":
            result = F.autocontrast(images.contiguous())
        case "Sharpness":
            result = F.adjust_sharpness(images, 1.0 + magnitude)
        case "Posterize":
            result = F.posterize(images, int(magnitude))
        case "Solarize":
            result = F.solarize(images, 255.0 * magnitude)
        case "Equalize":
            result = F.equalize(images)
        case "Invert":
            result = F.invert(images)
        case _:
            raise ValueError(f"{name} is none of the operations: {', '.join(OPERATIONS)}.")
    answer: Tensor = result
    return answer


def _degrees(slope: float) -> float:
    return math.degrees(math.atan(slope))


@cache
def functional() -> Any:
    """torchvision's functions on tensors; slow to import."""
    make_importable()
    return import_module("torchvision.transforms.v2.functional")
