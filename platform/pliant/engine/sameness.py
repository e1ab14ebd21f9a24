"""That all ranks, and a run that is resumed, see the same images: positions in the order mean nothing otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pliant.data import Dataset, Fingerprint
from pliant.engine.ranks import Ranks
from pliant.errors import UserError


def require_same_on_ranks(dataset: Dataset, ranks: Ranks) -> None:
    """Collective. An image that is broken on some machines alone is put up with, as if it had broken there later.

    Raises:
        UserError: (on all ranks) a rank sees other images than rank 0.
    """
    first, *others = ranks.all(dataset.fingerprints())
    for rank, theirs in enumerate(others, 1):
        for name in first | theirs:
            one, other = first.get(name), theirs.get(name)
            if one is None or other is None or one.images != other.images:
                here, there = (0 if found is None else found.images for found in (one, other))
                what = f"sees {there} {name} images and rank 0 sees {here}"
            elif not one.same_contents(other):
                what = f"sees other {name} images than rank 0, though as many ({one.images})"
            else:
                continue
            raise UserError(f"Rank {rank} {what}: give every machine the same copy of the dataset.")


def kept(train: Fingerprint) -> dict[str, Any]:
    """What a checkpoint keeps of the training images."""
    return asdict(train)


def require_same_as_begun(before: Mapping[str, Any] | None, train: Fingerprint, run: Path) -> list[str]:
    """What to warn of where a run goes on with images that have broken, or were mended, since.

    Args:
        before: what the checkpoint keeps of them; None in those of earlier versions, which are believed.

    Raises:
        UserError: images were added, removed, changed or sorted into other classes. A run's dataset is fixed: their
            order, and what each step sees, would be another.
    """
    if before is None:
        return []
    begun = Fingerprint(**before)
    if begun.images != train.images:
        what = f"there are {train.images} and were {begun.images}"
    elif not begun.same_positions(train):
        what = f"as many ({train.images}), but of other classes"
    elif not begun.same_contents(train):
        what = f"as many ({train.images}), but with other contents"
    elif begun.strict != train.strict or begun.broken == train.broken:
        return []
    else:
        return ["other training images are broken than when the run was begun: another stands in for each of them."]
    raise UserError(
        f"The training images are others than when {run} was begun, {what}: write --data.root with the old ones, or "
        "leave --resume out."
    )
