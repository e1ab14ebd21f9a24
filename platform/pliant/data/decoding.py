"""What counts as an image, and what it looks like: Pillow is the judge, whichever loader decodes.

A stored image is sound where Pillow decodes all of it. Its pixels are then those that DALI gives too: the same in
files of 8 bits a colour, off by one at most in those of 16.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""Told by a file's content, not by its name."""
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L")
_ORIENTATION = 274  # TIFF's tag
_SHRINK = 8  # JPEG's largest reduction: all bytes are read and decoded, few pixels computed


class Faulty(Exception):  # noqa: N818 - nothing went wrong here: it is what was found
    """An image cannot be used; the text is the reason, to stand in brackets."""


def size_of(file: str | io.BytesIO) -> tuple[int, int]:
    """Height and width in pixels as stored, from the header alone.

    Raises:
        Faulty: it is no image, or of a kind that loaders would not agree on.
        OSError: the file cannot be read.
        MemoryError: there is too little for it, which is no fault of the image.
    """
    try:
        with _opened(file) as image:
            return _accepted(image)
    except OSError as error:
        if error.errno is not None:  # not Pillow's
            raise
        raise Faulty(reason(error)) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise Faulty(reason(error)) from None


def check(encoded: bytes) -> tuple[int, int]:
    """Height and width of an image, every byte of which was decoded.

    Raises:
        Faulty: as `size_of`, or its content is damaged or incomplete.
        MemoryError: as `size_of`.
    """
    if not encoded:
        raise Faulty("it is empty")
    try:
        with _opened(io.BytesIO(encoded)) as image:
            if image.format == "PNG":
                image.verify()  # its own checksums, which decoding passes over
        with _opened(io.BytesIO(encoded)) as image:
            size = _accepted(image)
            if image.format == "JPEG":  # two thirds of the time of all pixels, with the same verdict
                image.draft(image.mode, (max(1, image.width // _SHRINK), max(1, image.height // _SHRINK)))
            image.load()
            return size
    except MemoryError:
        raise
    except Exception as error:
        raise Faulty(reason(error)) from None


def decoded(encoded: bytes) -> Image.Image:
    """The whole image in RGB, an EXIF rotation not applied.

    Raises:
        Faulty: as `check`.
        MemoryError: as `size_of`.
    """
    try:
        with _opened(io.BytesIO(encoded)) as image:
            _accepted(image)
            if image.mode.startswith("I;16"):
                # Pillow would cut off what lies above 255.
                grey = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
                return Image.fromarray(grey).convert("RGB")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise Faulty(reason(error)) from None


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words without a stop at the end."""
    if isinstance(error, UnidentifiedImageError):
        return f"its format is none of {', '.join(FORMATS)}"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


def _opened(file: str | io.BytesIO) -> AbstractContextManager[Image.Image]:
    return Image.open(file, formats=FORMATS)


def _accepted(image: Image.Image) -> tuple[int, int]:
    # Pillow cuts what loaders scale, and DALI reads transparency in TIFF as a colour.
    if image.mode not in _MODES or (image.format, image.mode) == ("TIFF", "LA"):
        raise Faulty(f"its pixels are of Pillow's mode {image.mode} in {image.format}, which loaders read unlike")
    # Pillow turns a TIFF as it loads it; and DALI takes the colours of a PPM as they are, whatever their maximum.
    turned = image.tag_v2.get(_ORIENTATION, 1) if isinstance(image, TiffImageFile) else 1
    if turned != 1:
        raise Faulty(f"it is a TIFF of orientation {turned}, which loaders read unlike")
    if isinstance(image, PpmImageFile) and image.tile and isinstance(image.tile[0].args, tuple):
        highest = image.tile[0].args[1]  # plain bitmaps have none
        if highest not in (255, 65535):
            raise Faulty(f"the highest of its colours is {highest} in PPM, which loaders read unlike")
    return image.height, image.width
