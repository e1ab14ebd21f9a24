"""The images that a run holds out of training, as lists for other programs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from pliant.data.dataset import held_out_positions, open_dataset
from pliant.data.index import Index, Split
from pliant.experiment import Data


def lists(data: Data, seed: int) -> tuple[list[str], list[str]]:
    """What a run with these settings holds out, and what it learns from.

    Args:
        data: of the run; `held_out` says how many images.
        seed: of the run.

    Returns:
        A line for each image, in the order of the dataset. An image folder's are paths below `data.root`; those of a
        dataset that is held in memory are positions in its training images, from 0.

    Raises:
        UserError: there is no such dataset, or nothing would be left to train on.
    """
    train = open_dataset(replace(data, held_out=0), seed).train
    held_out = held_out_positions(train.labels, data.held_out, seed)
    kept = np.zeros(len(train), np.bool_)
    kept[held_out] = True
    lines = _lines(train, data.root)
    return (
        [line for line, back in zip(lines, kept, strict=True) if back],
        [line for line, back in zip(lines, kept, strict=True) if not back],
    )


def _lines(split: Split, root: Path | None) -> list[str]:
    if not isinstance(split, Index) or root is None:
        return [str(position) for position in range(len(split))]
    return [os.path.relpath(split.path(position), root) for position in range(len(split))]
