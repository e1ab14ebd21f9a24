"""The edge of every command: what a user can mend becomes one sentence on stderr and an exit status."""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from pliant.errors import EXIT_INTERRUPTED, EXIT_RANKS_LOST, EXIT_USER_ERROR, Interrupted, RanksLost, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def guarded(action: Callable[[], None]) -> None:
    """Runs it, its log on stderr; what a user can mend becomes a sentence and an exit status."""
    try:
        with _heard():
            action()
    except (UserError, RanksLost) as error:
        print(f"{_prefix()}error: {error}", file=sys.stderr, flush=True)
        _exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RANKS_LOST)
    except Interrupted as stop:
        if _rank() == "0":
            from pliant.engine.launch import again

            print(f"{stop}\nGo on with: {again(stop.command or sys.argv, stop.run)}", flush=True)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in (*_FULL, *_FORBIDDEN):
            _end_abandoned()
            raise
        place = error.filename or "A file"
        what, mend = ("written", "make room there") if error.errno in _FULL else ("used", "mend its permissions")
        print(
            f"{_prefix()}error: {place} cannot be {what} ({error.strerror}): {mend}; what was written before stands.",
            file=sys.stderr,
        )
        _exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:  # before the run listens for signals, or after it
        print("Stopped.", file=sys.stderr)
        _exit(130)
    except Exception:
        _end_abandoned()
        raise


def _exit(status: int) -> NoReturn:
    _end_abandoned(status)
    sys.exit(status)


def _end_abandoned(status: int | None = None) -> None:
    """Ends the process at once if a process group was left open: the interpreter would close it, and wait for ranks
    that do not come. Without a status, what is being raised is printed first, and the status is 1."""
    ranks = sys.modules.get("pliant.engine.ranks")
    if ranks is None or not ranks.abandoned():
        return
    if status is None:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if status is None else status)


@contextmanager
def _heard() -> Iterator[None]:
    """Shows what parts without a place of their own to speak say: that a long scan gets on, for instance."""
    logger, handler = logging.getLogger("pliant"), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _prefix() -> str:
    return "" if _rank() == "0" else f"rank {_rank()}: "


def _rank() -> str:
    """This process's rank, once it has joined the others."""
    return os.environ.get("RANK", "0")
