"""Which class each of ImageNet's validation images has: from the development kit, or from a list as plain text.

The archive of validation images has no classes. The kit numbers the classes 1 to 1000 in an order of its own, not that
of the sorted wnids, and says which number each image has; its meta.mat says which wnid a number stands for.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from pliant.errors import UserError, optional_import
from pliant.preparation.tars import DAMAGES, reason

_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"


def from_devkit(path: Path) -> dict[str, str]:
    """The wnid of each validation image, by file name.

    Args:
        path: ILSVRC2012_devkit_t12.tar.gz.

    Raises:
        UserError: it is no such archive, or SciPy is not installed.
    """
    scipy_io = optional_import("scipy.io", extra="mat", purpose=f"Reading {path.name}")
    meta, truth = _members(path)
    try:
        synsets = np.atleast_1d(scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        # Groups of classes stand there too, under numbers that no image has.
        wnids = {int(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets}
        if strange := [wnid for wnid in wnids.values() if not wnid.isalnum()]:
            raise UserError(f"{path} names a class {strange[0]!r}: write the kit from the publisher.")  # noqa: TRY301
        numbers = [int(line) for line in truth.decode().split()]
        return {f"ILSVRC2012_val_{place:08d}.JPEG": wnids[number] for place, number in enumerate(numbers, 1)}
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"The development kit {path} cannot be read ({reason(error)}): fetch it again.") from None


def from_text(path: Path) -> dict[str, str]:
    """The wnid of each validation image, by file name, from lines such as `ILSVRC2012_val_00000001.JPEG n01751748`.

    Raises:
        UserError: it cannot be read, a line is no pair, or an image comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = reason(error) if isinstance(error, OSError) else "it is no text"
        raise UserError(f"The list {path} cannot be read ({said}): write another as --val-labels.") from None
    wnids: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or words[0] in wnids or "/" in words[1] or words[1].startswith("."):
            raise UserError(
                f"Line {number} of {path} is not understood: write one image and its wnid on each line, for instance "
                "ILSVRC2012_val_00000001.JPEG n01751748, and each image once."
            )
        wnids[words[0]] = words[1]
    if not wnids:
        raise UserError(f"The list {path} is empty: write lines such as ILSVRC2012_val_00000001.JPEG n01751748.")
    return wnids


def _members(path: Path) -> tuple[bytes, bytes]:
    """The two files of the kit that matter, read without unpacking anything."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                for wanted in (_META, _TRUTH):
                    content = archive.extractfile(member) if member.isreg() and member.name.endswith(wanted) else None
                    if content is not None:
                        found[wanted] = content.read()
    except (OSError, *DAMAGES) as error:
        raise UserError(
            f"The development kit {path} cannot be read ({reason(error)}): write ILSVRC2012_devkit_t12.tar.gz as "
            "--devkit."
        ) from None
    missing = [wanted for wanted in (_META, _TRUTH) if wanted not in found]
    if missing:
        raise UserError(f"{path} holds no {missing[0]}: write ILSVRC2012_devkit_t12.tar.gz as --devkit.")
    return found[_META], found[_TRUTH]
