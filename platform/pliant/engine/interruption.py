"""Signals become a flag; the run looks at it between steps and between batches, and all ranks agree on it.

A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interruption:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Sets the flag; nothing else is safe to do inside a signal handler."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class Stopped(Exception):  # noqa: N818 - no error
    """Raised between batches, on all ranks together, once one was asked to stop."""


@contextmanager
def listening() -> Iterator[Interruption]:
    """Within it, signals set the flag; afterwards they act as before."""
    interruption = Interruption()
    before = {number: signal.signal(number, interruption.handle) for number in _SIGNALS}
    try:
        yield interruption
    except KeyboardInterrupt:
        if not interruption.asked:
            raise
        print("Left at once; the newest checkpoint stands.", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
