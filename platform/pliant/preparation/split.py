"""The images that a run holds out of training, as lists for other programs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from pliant.data.dataset import held_out_positions, open_dataset
from pliant.data.index import Index, Split
from pliant.images import Data


def lists(data: Data, seed: int) -> tuple[list[str], list[str]]:
    """What a run with these settings holds out, and what it learns from.

    Args:
        data: of the run; `held_out` says how many images, at least 1.
        seed: of the run.

    Returns:
        A line for each image, in the order of the dataset. An image folder's are paths below `data.root`; those of a
        dataset that is held in memory are positions in its training images, from 0.

    Raises:
        UserError: what a run with these settings refuses: there is no such dataset, nothing would be left to train on,
            or too many images are broken.
    """
    if data.of_files:
        dataset = open_dataset(data, seed)
        return _paths(dataset.held_out, data.root), _paths(dataset.train, data.root)
    labels = open_dataset(replace(data, held_out=0), seed).train.labels
    held_out = held_out_positions(labels, data.held_out, seed)
    learned = np.setdiff1d(np.arange(len(labels)), held_out)
    return [str(position) for position in held_out], [str(position) for position in learned]


def _paths(split: Split | None, root: Path | None) -> list[str]:
    assert isinstance(split, Index) and root is not None  # files, of which some are held out
    return [os.path.relpath(split.path(position), root) for position in range(len(split))]
