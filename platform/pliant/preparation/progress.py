"""How far a long step has come: a bar on a terminal, a plain line now and then elsewhere; both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_S = 10.0  # between two plain lines


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows the progress of a block, which calls what it is given with the number of things it has done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total)
        yield lambda number: bar.advance(task, number)


def note(text: str) -> None:
    """A line for the person who waits, and for no program."""
    print(text, file=sys.stderr, flush=True)


def _plain(what: str, total: int) -> Callable[[int], None]:
    done, said = 0, time.monotonic()

    def advance(number: int) -> None:
        nonlocal done, said
        done += number
        if done >= total or time.monotonic() - said >= _LINE_S:
            said = time.monotonic()
            note(f"{what}: {done:,} of {total:,}")

    return advance
