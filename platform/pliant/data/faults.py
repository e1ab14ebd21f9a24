"""Broken images: how many there are, which, and when there are too many to go on.

A broken image never ends a run by itself. In training and calibration another of its class stands in for it: the
next sound one in the order of the split, whichever loader, rank or run asks. In validation it is left out, and
accuracy is that over the others.

With `data.check` header this holds for damage that a decoder meets: DALI decodes no further down than the window
reaches, so an image cut off below it is served as sound there, where Pillow, which decodes all of it, finds it broken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import numpy as np

from pliant.data.index import Index
from pliant.errors import UserError

_log = logging.getLogger(__name__)

FEW = 10
"""So many broken images are put up with in any split, however small."""
_NAMED = 10  # broken images that one line names


class Faults:
    """The broken images that a feed has met. Safe in threads.

    Each rank counts those that it meets itself, and refuses a split by its own count: with R ranks up to R times as
    many may be met before one of them gives up. Those found when a split was indexed are counted by all.
    """

    def __init__(self, share: float) -> None:
        """`share`: of a split's images that may be broken, in [0, 1]."""
        self.tell: Callable[[str], None] = _log.warning
        """Where lines for a person go."""
        self._share = share
        self._lock = threading.Lock()
        self._met: dict[str, str] = {}
        self._splits: dict[int, int] = {}

    @property
    def found(self) -> dict[str, str]:
        """Why an image was found broken while the feed served, by its path; without those known from indexing."""
        with self._lock:
            return dict(self._met)

    def met(self, index: Index, position: int, reason: str, *, replaced: bool) -> None:
        """An image turned out to be broken when it was read; told once.

        Args:
            replaced: another stands in for it; else it is left out.

        Raises:
            UserError: now too many are.
        """
        if np.isin(position, index.broken):  # known, and told of before
            return
        path = index.path(position)
        with self._lock:
            if path in self._met:
                return
            self._met[path] = reason
            number = self._splits[id(index)] = self._splits.get(id(index), len(index.broken)) + 1
        what = "another of its class stands in for it" if replaced else "accuracy is over the other images"
        shown = index.shown(position)
        self.tell(f"the image {shown} is broken ({reason}): {what}.")
        refuse_if_many(index, self._share, number, f"{shown} ({reason})")


def refuse_if_many(index: Index, share: float, number: int, one: str) -> None:
    """Refuses a split too many images of which are broken, or all.

    Args:
        share: how many may be.
        number: how many are.
        one: one of them, and why.

    Raises:
        UserError: they are all there are; or more than `share` of all, and more than FEW.
    """
    if number >= len(index):
        raise UserError(
            f"None of the {len(index)} images in {index.table.listing.folder} that are asked for can be read, for "
            f"instance {one}: replace or remove them."
        )
    most = max(FEW, int(share * len(index)))
    if number > most:
        raise UserError(
            f"{number} of the {len(index)} images in {index.table.listing.folder} are broken, more than {most}, for "
            f"instance {one}: replace or remove them, or write a larger --data.broken-share than {share:g}."
        )


def check_known(index: Index, share: float, *, replaced: bool) -> None:
    """Refuses a split that cannot be used for what was found broken when it was indexed.

    Args:
        share: of its images that may be broken.
        replaced: others stand in for them.

    Raises:
        UserError: too many are broken; or all images of a class are, and others should stand in for them.
    """
    if not len(index.broken):
        return
    first = int(index.broken[0])
    refuse_if_many(index, share, len(index.broken), f"{index.shown(first)} ({index.reason(first)})")
    if replaced:
        labels, classes = index.labels, len(index.classes)
        sound = np.bincount(labels, minlength=classes) - np.bincount(labels[index.broken], minlength=classes)
        for position in index.broken[sound[labels[index.broken]] == 0][:1].tolist():
            raise no_stand_in(index, position, index.reason(position))


def no_stand_in(index: Index, position: int, reason: str) -> UserError:
    """The sentence for an image that is broken like all others of its class."""
    return UserError(
        f"No image of the class {index.classes[index.labels[position]]} can be read, for instance "
        f"{index.shown(position)} ({reason}): replace the images, or remove the class."
    )


def note(name: str, index: Index, *, replaced: bool) -> str | None:
    """What a person should know of the images found broken when a split was indexed; None where there are none."""
    broken = index.broken.tolist()
    if not broken:
        return None
    named = "; ".join(f"{index.shown(one)} ({index.reason(one)})" for one in broken[:_NAMED])
    more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    what = (
        "another of its class stands in for each"
        if replaced
        else f"accuracy is over the {len(index) - len(broken)} others"
    )
    verb = "is" if len(broken) == 1 else "are"
    return f"{len(broken)} of the {len(index)} {name} images {verb} broken, {what}: {named}{more}."
