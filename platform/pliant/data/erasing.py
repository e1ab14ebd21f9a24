"""Random erasing: a rectangle of a normalised image is replaced by the mean colour, a random colour or noise.

As timm's `RandomErasing` does: an area uniform in 2 % to a third of the image, an aspect log-uniform in 0.3 to 1 / 0.3,
ten tries to find one that fits. timm draws image by image from Python's and the device's global generators; here a
whole batch is drawn at once from a generator that is handed in, noise included, so it is the same on every device.

Zhong et al. 2020, arXiv 1708.04896.

Shapes: B images of the batch, P erased pixels of all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.augmentation import Augmentation

_AREAS = (0.02, 1 / 3)
_ASPECTS = (0.3, 1 / 0.3)
_TRIES = 10


@dataclass(frozen=True, eq=False)
class Erasing:
    """The rectangles of B images, and what stands in their place."""

    box: NDArray[np.int32]
    """(B, 4): top, left, height and width; height 0 where nothing is erased."""
    colours: NDArray[np.float32] | None = None
    """In normalised colours: (B, 3), one for each image; or (P, 3), one for each pixel, row after row and image after
    image, if `pixelwise`. None: 0, the mean colour."""
    pixelwise: bool = False

    def part(self, images: slice | NDArray[np.int64]) -> Erasing:
        """Those of some of the images."""
        if self.colours is None or not self.pixelwise:
            return Erasing(self.box[images], None if self.colours is None else self.colours[images])
        kept = np.zeros(len(self.box), np.bool_)
        kept[images] = True
        return Erasing(self.box[images], self.colours[np.repeat(kept, self._areas)], pixelwise=True)

    def ends(self) -> NDArray[np.int64]:
        """(B,): the pixels of `colours` up to and with each image, if `pixelwise`."""
        return self._areas.cumsum()

    @property
    def _areas(self) -> NDArray[np.int64]:
        return self.box[:, 2].astype(np.int64) * self.box[:, 3]


def drawn_erasing(images: int, size: int, settings: Augmentation, generator: np.random.Generator) -> Erasing:
    """The rectangles of `images` images of `size` pixels, each erased with the probability that is set."""
    chosen = generator.random(images) < settings.erasing
    areas = size * size * generator.uniform(*_AREAS, (images, _TRIES))
    aspects = np.exp(generator.uniform(math.log(_ASPECTS[0]), math.log(_ASPECTS[1]), (images, _TRIES)))
    places = generator.random((images, 2))
    tries: NDArray[np.int64] = np.rint(np.sqrt(np.stack([areas * aspects, areas / aspects], axis=2))).astype(np.int64)
    fits = np.all(tries < np.array([size, size]), axis=2)
    extent = tries[np.arange(images), fits.argmax(axis=1)]
    corner = np.floor(places * (size - extent + 1))
    erased = (chosen & np.any(fits, axis=1))[:, None]
    box = np.where(erased, np.concatenate([corner, extent], axis=1), 0).astype(np.int32)
    if settings.erasing_mode == "const":
        return Erasing(box)
    pixelwise = settings.erasing_mode == "pixel"
    number = int(box[:, 2].astype(np.int64) @ box[:, 3]) if pixelwise else images
    return Erasing(box, generator.standard_normal((number, 3), np.float32), pixelwise)


def erase_(images: Tensor, erasing: Erasing) -> None:
    """Erases in place from normalised images: float32, (B, 3, H, W)."""
    pixels = images.permute(0, 2, 3, 1)
    colours: Tensor | None = None
    if erasing.colours is not None:
        colours = torch.from_numpy(erasing.colours).to(images.device, non_blocking=True)
    ends = erasing.ends()
    for number in np.flatnonzero(erasing.box[:, 2]).tolist():
        top, left, height, width = erasing.box[number].tolist()
        inside = pixels[number, top : top + height, left : left + width]
        if colours is None:
            inside.zero_()
        elif erasing.pixelwise:
            inside.copy_(colours[ends[number] - height * width : ends[number]].view(height, width, 3))
        else:
            inside.copy_(colours[number])
