"""What is done to a whole batch at once, on the device that trains: mirroring, operations, colours, normalisation,
erasing, mixing, in this order.

The same whichever loader cut the images out. Colours are computed in float32 without rounding in between:
brightness, contrast, saturation, in this order, as torchvision's functions of these names do on float images;
then lighting adds AlexNet's principal components of colour, in shares of the full scale.

Shapes: B images of H x W pixels. On a CPU a broadcast over a last dimension of 3 runs several times slower
than the arithmetic, so rows of 3 W values are the unit here: that is how channels-last images lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.data.buffers import Buffers
from pliant.data.erasing import erase_
from pliant.data.mixing import mix_
from pliant.data.operations import changed
from pliant.data.plan import Plan


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of red, green and blue, as shares of the full scale."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
OF_SOURCE = {
    "folder": IMAGENET,
    "shards": IMAGENET,
    "cifar10": CIFAR10,
    "cifar100": Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Normalisation((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
"""Statistics of each source's training images."""

GREY = (0.2989, 0.587, 0.114)
"""How much of red, green and blue makes the brightness of a pixel: torchvision's numbers."""
_EIGENVALUES = (0.2175, 0.0188, 0.0045)
_EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


class Finish:
    """Turns the images that a loader cut out into those that a network is fed."""

    def __init__(self, normalisation: Normalisation, device: torch.device) -> None:
        """For batches that go to `device`."""
        std = torch.tensor(normalisation.std, dtype=torch.float64)
        mean = torch.tensor(normalisation.mean, dtype=torch.float64)
        self.device = device
        self._buffers = Buffers()
        self._grey = torch.tensor(GREY, device=device)
        self._scale = (1 / (255 * std)).float().to(device)
        self._shift = (-mean / std).float().to(device)
        # Row k: what one unit of principal component k adds to normalised red, green and blue.
        components = torch.tensor(_EIGENVECTORS, dtype=torch.float64) * torch.tensor(_EIGENVALUES)
        self._components = (components / std[:, None]).T.contiguous().float().to(device)

    def __call__(self, images: Tensor, plan: Plan) -> Tensor:
        """Normalised float32 images on the device, (B, 3, H, W), channels last.

        Args:
            images: uint8, (B, 3, H, W), channels last; may be written over.
            plan: says which are mirrored, and all that follows.
        """
        images = images.to(self.device, non_blocking=True)
        if plan.flip.any():
            images = mirrored(images, plan.flip)
        if plan.operations is not None:
            images = changed(images, plan.operations)
        batch, _, height, width = images.shape
        rows = self._floats(images.permute(0, 2, 3, 1).reshape(batch, height, 3 * width))
        if plan.jitter is not None:
            jitter_(rows, torch.from_numpy(plan.jitter).to(self.device, non_blocking=True), self._grey)
        shift = self._shift[None, None]
        if plan.lighting is not None:
            lighting = torch.from_numpy(plan.lighting).to(self.device, non_blocking=True)
            shift = shift + (lighting @ self._components)[:, None]
        torch.addcmul(shift.repeat(1, 1, width), rows, self._scale.repeat(width), out=rows)
        finished = rows.view(batch, height, width, 3).permute(0, 3, 1, 2)
        if plan.erasing is not None:
            erase_(finished, plan.erasing)
        if plan.mixing is not None:
            mix_(finished, plan.mixing)
        return finished

    def _floats(self, rows: Tensor) -> Tensor:
        if rows.device.type != "cpu":
            return rows.float()
        return self._buffers.take(tuple(rows.shape)).copy_(rows)


def mirrored(images: Tensor, flip: NDArray[np.bool_]) -> Tensor:
    """The images, those marked in `flip` (B,) left to right.

    Args:
        images: uint8, (B, 3, H, W), channels last; written over on a CPU.
    """
    if images.device.type != "cpu":
        marks = torch.from_numpy(flip).to(images.device, non_blocking=True)
        return torch.where(marks[:, None, None, None], images.flip(3), images)
    pixels = images.permute(0, 2, 3, 1)
    marked = np.flatnonzero(flip)
    # NumPy writes an image in one piece where torch writes value by value.
    pixels.numpy()[marked] = pixels.index_select(0, torch.from_numpy(marked)).flip(2).numpy()
    return images


def jitter_(rows: Tensor, factors: Tensor, grey: Tensor) -> None:
    """Change brightness, contrast and saturation, in this order, in place.

    Args:
        rows: values from 0 to 255, (B, H, 3 W), rows of pixels of three values each.
        factors: (B, 3); 1 leaves an image as it is.
        grey: (3,), how much of each colour makes the brightness of a pixel.
    """
    # A CPU keeps one image at a time in its cache.
    part = 1 if rows.device.type == "cpu" else len(rows)
    for some, three in zip(rows.split(part), factors.split(part), strict=True):
        brightness, contrast, saturation = three[:, :, None, None].unbind(1)
        pixels = some.view(len(some), -1, 3)
        some.mul_(brightness).clamp_(0, 255)
        mean = (some.sum(1).view(len(some), -1, 3).sum(1) @ grey / pixels.shape[1]).view(-1, 1, 1)
        some.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 255)
        shade = (pixels @ grey)[..., None]
        some.mul_(saturation)
        pixels.add_(shade * (1 - saturation)).clamp_(0, 255)
