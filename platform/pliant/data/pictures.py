"""Small pictures of a split's images, for a person."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pliant.data.decoding import Faulty, decoded
from pliant.data.index import Index, Split


def thumbnails(split: Split, positions: NDArray[np.int64], pixels: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Some of the images, centre-cropped to squares.

    Args:
        positions: which; those that turn out to be broken are left out.
        pixels: of a side; images in memory are given as they lie.

    Returns:
        (n, side, side, 3), and which of the positions they are of: (n,), indices into `positions`.
    """
    if not isinstance(split, Index):
        return split.images[positions], np.arange(len(positions))
    pictures, shown = [], []
    for place, position in enumerate(positions.tolist()):
        try:
            image = decoded(split.encoded(position))
        except Faulty:
            continue
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.resize((pixels, pixels), box=(left, top, left + side, top + side))
        pictures.append(np.asarray(square))
        shown.append(place)
    empty = np.zeros((0, pixels, pixels, 3), np.uint8)
    return np.stack(pictures) if pictures else empty, np.array(shown, np.int64)
