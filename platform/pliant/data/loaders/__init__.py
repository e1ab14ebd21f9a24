"""What carries plans out. A loader turns a stream of requests into a stream of images, in the same order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.data.plan import Plan


@dataclass(frozen=True, eq=False)
class Request:
    """One batch to load."""

    positions: NDArray[np.int64]
    """(B,), which images of the split."""
    plan: Plan
    """What to cut out of each."""
    redraw: Callable[[NDArray[np.int64]], Plan] | None = None
    """The plan that other images would have in these places, from the same draws: stand-ins take the places of broken
    images. None: broken images are left out."""

    def part(self, entries: NDArray[np.int64]) -> Request:
        """Some of the images alone."""
        return Request(self.positions[entries], self.plan.part(entries))


Loaded = tuple[Request, Tensor]
"""A request and its images."""


class Loader(Protocol):
    """Decodes the images of one split."""

    def stream(self, requests: Iterable[Request]) -> Generator[Loaded, None, None]:
        """The images of each request, cut out and resized, neither mirrored nor changed in colour.

        Where images are broken, the request that comes back says which took their places, or has them no more; one
        that has none left is passed over. Works ahead of its consumer where that pays. Closing it frees threads and
        buffers.

        Args:
            requests: batches, none larger than the first.

        Yields:
            Each request, and uint8 (B, 3, size, size), channels last in memory; the receiver may write over it.

        Raises:
            UserError: too many images are broken, or all of a class.
        """


def execute(loader: Loader, positions: NDArray[np.int64], plan: Plan) -> Tensor:
    """The images of one batch: `Loader.stream` for a single request."""
    with closing(loader.stream([Request(positions, plan)])) as stream:
        return next(stream)[1]


def blank(plan: Plan, pin: bool) -> Tensor:
    """Uninitialised uint8 images for a plan, (B, 3, size, size), channels last; pinned for copies to a GPU."""
    return torch.empty((len(plan), plan.size, plan.size, 3), dtype=torch.uint8, pin_memory=pin).permute(0, 3, 1, 2)


def place(window: Tensor, plan: Plan, index: int, target: Tensor) -> None:
    """Resize a window and copy the square that the plan's entry `index` cuts out of it.

    Args:
        window: uint8, (3, height, width), in any memory order.
        target: uint8, (3, size, size), written.
    """
    resized = (int(plan.resized[index, 0]), int(plan.resized[index, 1]))
    if window.shape[1:] != resized:
        # Said to be channels last by the stride of its batch of one too, else torch makes planes of it and back.
        one = window.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
        window = torch.nn.functional.interpolate(
            one, size=resized, mode="bilinear", antialias=True, align_corners=False
        )[0]
    cut(window, plan, index, target)


def cut(resized: Tensor, plan: Plan, index: int, target: Tensor) -> None:
    """Copy the square that the plan's entry `index` cuts out of a resized window, black where it reaches beyond."""
    size = plan.size
    top, left = (int(value) for value in plan.offset[index])
    part = resized[:, max(top, 0) : top + size, max(left, 0) : left + size]
    if part.shape[1:] != (size, size):
        target.zero_()
    first_row, first_column = max(-top, 0), max(-left, 0)
    target[:, first_row : first_row + part.shape[1], first_column : first_column + part.shape[2]] = part
