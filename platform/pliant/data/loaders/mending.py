"""What is done where images of a batch turn out to be broken: the same in every loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from pliant.data.decoding import Faulty
from pliant.data.faults import Faults, no_stand_in
from pliant.data.index import Index
from pliant.data.loaders import Request

T = TypeVar("T")


def mend(
    request: Request,
    got: list[T | Faulty],
    *,
    index: Index,
    faults: Faults,
    fetch: Callable[[int], T],
) -> tuple[Request, list[T]]:
    """A request whose every image could be fetched, and what was fetched of each.

    Args:
        got: of each image of the request, what was fetched, or why it could not be.
        fetch: what `got` came from, for a position; raises Faulty.

    Returns:
        The request itself where nothing was wrong. Else one with stand-ins in the places of the broken images, their
        windows drawn for their own sizes; or, for a request that cannot be drawn anew, one without those images.

    Raises:
        UserError: too many images are broken, or all of a class.
    """
    broken = {entry: one for entry, one in enumerate(got) if isinstance(one, Faulty)}
    if not broken:
        return request, [one for one in got if not isinstance(one, Faulty)]
    for entry, fault in broken.items():
        faults.met(index, int(request.positions[entry]), str(fault), replaced=request.redraw is not None)
    if request.redraw is None:
        sound = np.array([entry for entry in range(len(got)) if entry not in broken], np.int64)
        return request.part(sound), [one for one in got if not isinstance(one, Faulty)]
    positions, mended = request.positions.copy(), dict(enumerate(got))
    for entry, fault in broken.items():
        positions[entry], mended[entry] = _stand_in(int(positions[entry]), fault, index, faults, fetch)
    whole = [one for one in mended.values() if not isinstance(one, Faulty)]
    return replace(request, positions=positions, plan=request.redraw(positions)), whole


def _stand_in(position: int, fault: Faulty, index: Index, faults: Faults, fetch: Callable[[int], T]) -> tuple[int, T]:
    """The first stand-in that can be fetched."""
    for other in index.stand_ins(position):
        try:
            return other, fetch(other)
        except Faulty as another:
            faults.met(index, other, str(another), replaced=True)
    raise no_stand_in(index, position, str(fault))
