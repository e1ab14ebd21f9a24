"""Small pictures of a split's images, for a person."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pliant.data.decoding import decoded
from pliant.data.index import Index, Split


def thumbnails(split: Split, positions: NDArray[np.int64], pixels: int) -> NDArray[np.uint8]:
    """The images at `positions`, centre-cropped to squares, (n, side, side, 3): `pixels` a side, or as they lie in
    memory."""
    if not isinstance(split, Index):
        return split.images[positions]
    pictures = []
    for position in positions:
        image = decoded(split.encoded(int(position)))
        factor = pixels / min(image.size)
        image = image.resize((max(pixels, round(image.width * factor)), max(pixels, round(image.height * factor))))
        left, top = (image.width - pixels) // 2, (image.height - pixels) // 2
        pictures.append(np.asarray(image.crop((left, top, left + pixels, top + pixels))))
    return np.stack(pictures) if pictures else np.zeros((0, pixels, pixels, 3), np.uint8)
