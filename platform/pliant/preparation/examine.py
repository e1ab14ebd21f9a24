"""Decodes images strictly, in a process of its own: a decoder that crashes takes one image with it, not the run.

Says READY, then reads a JSON line [path, offset, size, whole, name] for each image from stdin and answers with a line
of findings. Ends when stdin does, so none is left behind if whoever started it is killed. Imports little, as there is
one for each core.
"""

from __future__ import annotations

import io
import json
import sys
import warnings

from PIL import Image

from pliant.data.decoding import FORMATS, Faulty, check
from pliant.errors import UserError
from pliant.preparation.span import Span

READY = "ready"
NO_MEMORY = 71
"""Exit status: there is too little of it, which is no fault of the image."""

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),  # several pictures in one JPEG, as some cameras write
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = 1
_LARGE = 40e6  # pixels: 120 MB decoded, more than any image of ImageNet
_PNG_DEPTH = 24  # where a PNG says how many bits a channel has
_PNG_NOTES = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # its parts that may hold EXIF, before or after the pixels


def examine(content: bytes, name: str) -> tuple[str | None, list[str]]:
    """Decode an encoded image whole. Whether it is broken is judged as when a run indexes it.

    Returns:
        Why it is broken, or None; and what is unusual about it though it can be used.

    Raises:
        MemoryError: there is too little for it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's: what they warn of is found below
        try:
            check(content)
        except Faulty as fault:
            return str(fault), []
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return None, _oddities(image, content, name)


def _oddities(image: Image.Image, content: bytes, name: str) -> list[str]:
    odd = []
    if not name.lower().endswith(_SUFFIXES.get(image.format or "", ())):
        odd.append(f"{image.format} by its contents")
    if image.format == "JPEG" and b"\xff\xd9" not in content[-4096:]:
        odd.append("without its end marker")
    if image.mode == "CMYK":
        odd.append("CMYK")
    if image.mode.startswith("I;16") or (image.format == "PNG" and content[_PNG_DEPTH] > 8):
        odd.append("more than 8 bits a channel")
    may_turn = image.format != "PNG" or any(kind in content for kind in _PNG_NOTES)  # to ask a PNG decodes it again
    if may_turn and image.getexif().get(_ORIENTATION, _UPRIGHT) != _UPRIGHT:
        odd.append("to be shown turned or mirrored (EXIF)")
    if min(image.size) == 1:
        odd.append(f"{image.width} x {image.height} pixels")
    if image.width * image.height > _LARGE:
        odd.append(f"very large, {image.width} x {image.height} pixels")
    return odd


def main() -> None:
    """Answer until stdin ends."""
    print(READY, flush=True)
    for line in sys.stdin.buffer:
        path, offset, size, whole, name = json.loads(line)
        try:
            broken, odd = examine(Span(path, offset, size, whole).read(), name)
        except UserError as error:
            broken, odd = str(error), []
        except MemoryError:
            sys.exit(NO_MEMORY)
        print(json.dumps([broken, odd]), flush=True)


if __name__ == "__main__":
    main()
