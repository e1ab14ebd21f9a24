"""DistributedDataParallel over several passes: one bucketed reduction per step, during the last backward.

DDP reduces the parameters that took part in its last backward. The engine's anchor makes every learning parameter
take part in it, on every rank, so nothing stays local and no parameter has to be searched for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pliant.engine.backends.single import Single
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.experiment import Optimization
from pliant.recipe import Pass


class NextPass(nn.Module):
    """Runs the recipe's own code inside a wrapper's forward.

    So a recipe is handed the bare network, with all its methods, and may call it as often as it likes.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, passes: Iterator[Pass]) -> Pass | None:
        return next(passes, None)


class DataParallel(Single):
    """Collective in its making: rank 0's parameters go to all. Every rank takes the same optimizer step."""

    def __init__(self, net: nn.Module, ranks: Ranks, optimization: Optimization, precision: Precision) -> None:
        super().__init__(net, optimization, precision)
        self.averaged = ranks.count
        with warnings.catch_warnings():
            # Torch 2.13 has a new name for it; both mean the same here, and 2.11 knows only this one.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self._ddp = DistributedDataParallel(NextPass(net), broadcast_buffers=False)
        # Depthwise kernels have the same memory in both layouts, which DDP's check does not see.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Collective. A reduction of zeros, over parameters in their own order.

        After its first reduction DDP lays its buckets out anew, by the order in which gradients came. Three ranks or
        more then add in another order. So that a resumed run and the one that was not stopped add alike, it happens
        here, always the same, and not after whatever step comes first.
        """
        learning = self._learning().values()
        nothing = torch.stack([parameter.float().sum() for parameter in learning]).sum() * 0.0
        self._ddp(iter([Pass("nothing", nothing)]))
        nothing.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def forward(self, passes: Iterator[Pass], *, reduces: bool) -> Pass | None:
        """The next pass, or None. DDP decides here whether its backward reduces."""
        # What DDP.no_sync() sets, for the backward as well as for this forward.
        self._ddp.require_backward_grad_sync = reduces
        with self.precision.autocast():
            found: Pass | None = self._ddp(passes)
        return found
