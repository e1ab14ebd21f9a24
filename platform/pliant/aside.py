"""Files that are in their place whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path, *, flush: bool = False) -> Iterator[Path]:
    """Where to write what is to be at `path`: beside it and with its ending. It is renamed at the end, and removed if
    anything fails before.

    Args:
        flush: to the disk first, for what a power failure must not tear.
    """
    beside = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield beside
        if flush:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
