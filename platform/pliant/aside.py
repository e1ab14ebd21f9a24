"""Files that are in their place whole, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path, *, flush: bool = False, contended: bool = False) -> Iterator[Path]:
    """Where to write what is to be at `path`: beside it and with its ending. It is renamed at the end, and removed if
    anything fails before.

    Args:
        flush: to the disk first, for what a power failure must not tear.
        contended: another process may write the same file meanwhile: each has a name of its own beside it, and who is
            killed leaves one behind. Else the next writer takes that name over.
    """
    own = f".{secrets.token_hex(4)}" if contended else ""
    beside = path.with_name(f"{path.stem}{own}.partial{path.suffix}")
    try:
        yield beside
        if flush:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
