"""What a rank that hangs leaves behind: where each of its threads stood."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

from pliant.engine.ranks import Ranks


class Watchdog:
    """Writes every thread's stack if `alive` is not called again within the time-out."""

    def __init__(self, file: int | None, seconds: float) -> None:
        self._file, self._seconds = file, seconds

    def alive(self) -> None:
        """The time runs anew."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, file=self._file)


@contextlib.contextmanager
def watchdog(folder: Path, ranks: Ranks, minutes: float) -> Iterator[Watchdog]:
    """Over several ranks; what it may write lies in the run's folder, and is removed if nothing was written.

    NCCL's flight recorder, which says which collective each rank was in, is told to write beside it.
    """
    if ranks.count == 1:
        yield Watchdog(None, 0.0)
        return
    hangs = folder / "hangs"
    try:
        hangs.mkdir(exist_ok=True)
        path = hangs / f"rank-{ranks.rank:04d}.txt"
        file = path.open("a")  # what the run left behind that this one goes on with is what one looks for
    except OSError:  # a full disk: the log says so
        yield Watchdog(None, 0.0)
        return
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, str(hangs / "nccl-"))
    try:
        # Before the others' time-out ends the processes.
        yield Watchdog(file.fileno(), 0.9 * 60 * minutes)
    finally:
        faulthandler.cancel_dump_traceback_later()
        file.close()
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()
            hangs.rmdir()  # the last rank to leave finds it empty
