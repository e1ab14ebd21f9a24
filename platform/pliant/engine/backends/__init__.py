"""How the gradients of several passes become one gradient for all ranks, and one update.

A backend holds the network and its optimizer, and runs one pass at a time. The engine says of each pass whether it is
the step's last on this rank: gradients are reduced there alone, and its forward and backward run in the same state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pliant.engine.backends.ddp import DataParallel
from pliant.engine.backends.single import Single
from pliant.engine.optimization import Update
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.errors import UserError
from pliant.experiment import BackendName, Optimization
from pliant.recipe import Pass

OptimizerState = dict[str, dict[str, Any]]
"""By the name of a parameter and the optimizer's own name of the value: whole tensors, the same for every backend."""


class Backend(Protocol):
    """One way to run passes, to reduce their gradients and to take the optimizer's step."""

    averaged: int
    """Gradients come out divided by this many ranks; the engine multiplies losses by it."""
    anchored: bool
    """Whether every learning parameter has to take part in the last pass."""

    def step(self) -> AbstractContextManager[None]:
        """Collective. Around all passes of a step; the gradient is reduced when it ends, if not before."""

    def forward(self, passes: Iterator[Pass], *, reduces: bool) -> Pass | None:
        """The next pass of an iteration, in the run's precision; None if there is none."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of the pass that `forward` gave; Collective if it reduces."""

    def gradients(self) -> dict[str, Tensor]:
        """Collective. The step's reduced gradient by parameter, whole, as the update will take it: after `step`."""

    def update(self, lr: float) -> Update:
        """Collective. Clips the reduced gradient, steps, and clears it; left out on all ranks if not finite."""

    def whole(self) -> nn.Module:
        """Collective. The network with whole parameters, for reading."""

    def optimizer_state(self) -> OptimizerState:
        """Collective. What a checkpoint keeps of the optimizer; on rank 0."""

    def load_optimizer_state(self, state: OptimizerState) -> None:
        """Takes a checkpoint's state, of this or of another backend."""

    def close(self) -> nn.Module:
        """Collective. Ends it; the network, as it was trained, without anything of the backend."""


def require_served(kind: BackendName, ranks: Ranks) -> None:
    """Refuses a backend that is for another number of ranks.

    Raises:
        UserError: it is.
    """
    if kind == "single" and ranks.count > 1:
        raise UserError(f"--backend single serves one rank, and {ranks.count} take part: write --backend ddp.")
    if kind == "ddp" and ranks.count == 1:
        raise UserError("--backend ddp needs several ranks, and one takes part: write --backend single.")


def wrap(
    net: nn.Module,
    ranks: Ranks,
    kind: BackendName,
    optimization: Optimization,
    precision: Precision,
    deepspeed_config: Path | None = None,
) -> Backend:
    """Collective. The backend for a network whose learning parameters are set.

    Raises:
        UserError: the backend does not do what is asked of it.
    """
    if kind.startswith("zero"):
        from pliant.engine.backends.zero import Zero

        return Zero(net, ranks, int(kind[-1]), optimization, precision, deepspeed_config)
    if ranks.count > 1:
        return DataParallel(net, ranks, optimization, precision)
    return Single(net, optimization, precision)
