"""What all ranks agree on between two steps, or between two batches of an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pliant.engine.interruption import Interruption, Stopped
from pliant.engine.ranks import Ranks

Item = TypeVar("Item")


@dataclass(frozen=True)
class Beat:
    """The flags of one step, the same on every rank."""

    nonfinite: bool | None = None
    """The gradient was not finite, and the step was left out; None where no step's flags were left to read."""
    stop: bool = False
    """Some rank was asked to stop."""
    save: bool = False
    """Some rank's clock says that a checkpoint is due."""


class Beats:
    """One packed flag per step, read a step late so that nothing waits for it.

    Alone, a process knows at once whether it was asked to stop, or is to save.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[Callable[[], object], Tensor] | None = None
        self._reading = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None

    def beat(self, nonfinite: Tensor, *, stop: bool, save: bool = False) -> Beat:
        """Collective. The flags of the step before.

        Args:
            nonfinite: of this step, a scalar on the device, 0 or 1.
            stop: whether this process was asked to stop.
            save: whether this process finds that a checkpoint is due.
        """
        before = self.last()
        save = save and not before.save  # it is saved now
        flags = torch.stack(
            [nonfinite, torch.full_like(nonfinite, float(stop)), torch.full_like(nonfinite, float(save))]
        )
        self._pending = self._read_later(self._ranks.start_max(flags), flags)
        return Beat(before.nonfinite, stop, save) if self._ranks.count == 1 else before

    def last(self) -> Beat:
        """The flags not yet read."""
        if self._pending is None:
            return Beat()
        arrive, flags = self._pending
        self._pending = None
        arrive()
        return Beat(*(bool(flag) for flag in flags.tolist()))

    def _read_later(self, work: dist.Work | None, flags: Tensor) -> tuple[Callable[[], object], Tensor]:
        """What waits for the flags, and where they are to be read then.

        On a GPU they are copied out on a stream beside: on the one that computes, reading would wait for the next
        step as well, which by then is queued there.
        """
        if self._reading is None:
            return (lambda: None) if work is None else work.wait, flags
        out, arrived = torch.empty_like(flags, device="cpu", pin_memory=True), torch.cuda.Event()
        self._reading.wait_stream(torch.cuda.current_stream(flags.device))
        with torch.cuda.stream(self._reading):
            if work is not None:
                work.wait()  # the stream waits, not the host
            out.copy_(flags, non_blocking=True)
            arrived.record(self._reading)
        flags.record_stream(self._reading)
        return arrived.synchronize, out


def heeded(items: Iterable[Item], rounds: int, ranks: Ranks, interruption: Interruption) -> Iterator[Item]:
    """Collective. This rank's items, unless a rank is asked to stop on the way.

    Args:
        items: at most `rounds`; ranks may have unlike numbers.
        rounds: the greatest number over ranks.

    Raises:
        Stopped: on all ranks in the same round.
    """
    beats, rest = Beats(ranks), iter(items)
    for _ in range(rounds):
        for item in rest:
            yield item
            break
        if beats.beat(torch.zeros((), device=ranks.device), stop=interruption.asked).stop:
            beats.last()
            raise Stopped
    beats.last()
