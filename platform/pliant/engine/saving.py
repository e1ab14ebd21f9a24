"""When checkpoints are due, and their writing in the background, from a copy, while training goes on."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pliant.engine import checkpoint
from pliant.engine.ranks import Ranks
from pliant.errors import UserError
from pliant.experiment import Saving


class Copy:
    """A copy of nested values in memory that is kept for the next one: fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def take(self, value: Any) -> Any:
        """The values as they are now, on the CPU; valid until the next call."""
        copied = self._copied(value, "")
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to pinned memory run on their own
        return copied

    def _copied(self, value: Any, name: str) -> Any:
        if isinstance(value, dict):
            return {key: self._copied(one, f"{name}/{key}") for key, one in value.items()}
        if not isinstance(value, Tensor):
            return value
        kept = self._kept.get(name)
        if kept is None or (kept.shape, kept.dtype, kept.stride()) != (value.shape, value.dtype, value.stride()):
            kept = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self._kept[name] = kept
        return kept.copy_(value, non_blocking=value.is_cuda)


class Saver:
    """Writes a run's checkpoints on rank 0; to be entered with `with`.

    A failed write is reported when the next one begins, or at the end, and never loses an earlier checkpoint.
    """

    def __init__(self, folder: Path, ranks: Ranks, config: Saving, warn: Callable[[str], None]) -> None:
        self._folder, self._ranks, self._config, self._warn = folder, ranks, config, warn
        self._copy = Copy()
        self._writer = ThreadPoolExecutor(1, "pliant-checkpoint", initializer=_yield_to_training)
        self._pending: Future[Path] | None = None
        self._saved_at = time.monotonic()

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.settle()
        self._writer.shutdown()

    @property
    def minutes_are_up(self) -> bool:
        """Whether this rank's clock says that a checkpoint is due."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def prepare(self, state: dict[str, Any]) -> None:
        """Makes the memory that a copy of `state` takes, so that the first save need not."""
        if self._ranks.first:
            self.settle()  # a write under way, of the stage before, still reads that memory
            self._copy.take(state)

    def settle(self) -> None:
        """Waits for a write under way."""
        self._report(self._finished())

    def save(self, step: int, state: dict[str, Any], *, score: float | None, must: bool, lasting: bool = False) -> None:
        """Collective. Begins to write a checkpoint; `must`: waits for it, and a failure ends the run.

        `lasting`: newer ones do not replace it.

        Raises:
            UserError: it must be written, and cannot be.
        """
        self._saved_at = time.monotonic()
        problem: str | None = None
        if self._ranks.first:
            self.settle()
            copied = self._copy.take(state)
            if must:
                problem = self._problem(lambda: self._write(step, copied, score, lasting))
            else:
                self._pending = self._writer.submit(self._write, step, copied, score, lasting)
        if not must:
            return
        problem = self._ranks.from_first(problem)
        if problem is not None:
            raise UserError(f"No {problem}. Make room, then write --resume {self._folder.parent}.")

    def _write(self, step: int, copied: dict[str, Any], score: float | None, lasting: bool) -> Path:
        keep = self._config.keep
        return checkpoint.save(self._folder, step, copied, score=score, keep=keep, lasting=lasting)

    def _finished(self) -> str | None:
        """Waits for the write under way; what went wrong with it."""
        pending, self._pending = self._pending, None
        return None if pending is None else self._problem(pending.result)

    def _problem(self, written: Callable[[], Path]) -> str | None:
        try:
            written()
        except OSError as error:
            return f"checkpoint could be written to {self._folder} ({error.strerror}); earlier ones stand"
        return None

    def _report(self, problem: str | None) -> None:
        if problem is not None:
            self._warn(f"no {problem}, and the run goes on.")


def _yield_to_training() -> None:
    """The writing thread takes the time that training leaves: it has until the next checkpoint. Linux has a policy per
    thread; niceness 19 took half as much more."""
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
