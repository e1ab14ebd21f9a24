"""What all ranks agree on between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pliant.engine.ranks import Ranks


@dataclass(frozen=True)
class Beat:
    """The flags of one step, the same on every rank."""

    nonfinite: bool = False
    """The gradient was not finite, and the step was left out."""
    stop: bool = False
    """Some rank was asked to stop."""


class Beats:
    """One packed flag per step, read a step late so that nothing waits for it.

    Alone, a process knows at once whether it was asked to stop.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._pending: tuple[dist.Work | None, Tensor] | None = None

    def beat(self, nonfinite: Tensor, asked: bool) -> Beat:
        """Collective. The flags of the step before.

        Args:
            nonfinite: of this step, a scalar on the device, 0 or 1.
            asked: whether this process was asked to stop.
        """
        before = self.last()
        flags = torch.stack([nonfinite, torch.full_like(nonfinite, float(asked))])
        self._pending = (self._ranks.start_max(flags), flags)
        return Beat(before.nonfinite, asked) if self._ranks.count == 1 else before

    def last(self) -> Beat:
        """The flags not yet read."""
        if self._pending is None:
            return Beat()
        work, flags = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        nonfinite, stop = flags.tolist()
        return Beat(bool(nonfinite), bool(stop))
