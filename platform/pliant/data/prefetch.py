"""One background thread that works ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
_setting_threads = threading.Lock()
_POLL_S = 0.05  # how often a leaving consumer looks whether the thread has ended


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class _End:
    pass


class Prefetch(Generic[Item]):
    """Iterates over what a generator yields, computed ahead in a thread of its own while a `with` lasts.

    An exception in the thread is raised where the item would have come. Leaving the `with` stops the thread, after
    the item it is working on.
    """

    def __init__(self, produce: Callable[[], Generator[Item, None, None]], depth: int) -> None:
        """`produce` is called, and its generator advanced and closed, in the thread; up to `depth` items wait."""
        self._produce = produce
        self._queue: queue.Queue[Item | _Failure | _End] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pliant-prefetch", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            # The thread may be waiting to put an item into a full queue.
            try:
                self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._stopped.is_set():
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, (_End, _Failure)):
            self._stopped.set()
        if isinstance(item, _End):
            raise StopIteration
        if isinstance(item, _Failure):
            raise item.error
        return item

    def _run(self) -> None:
        last: _End | _Failure = _End()
        try:
            run_in_one_thread()
            with closing(self._produce()) as produced:
                for item in produced:
                    self._queue.put(item)
                    if self._stopped.is_set():
                        return
        except BaseException as error:
            last = _Failure(error)
        self._queue.put(last)


def run_in_one_thread() -> None:
    """Let torch's operations called from this thread run in it alone; other threads keep their setting.

    Several threads that each split small operations over all cores wait for one another more than they compute.
    """
    with _setting_threads:
        others = torch.get_num_threads()
        torch.set_num_threads(1)
        # Torch gives the last number set to every thread that begins to compute later: a thread that ends at
        # once restores it.
        restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
        restoring.start()
        restoring.join()
