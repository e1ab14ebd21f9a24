"""How the gradients of several passes become one gradient for all ranks.

A backend holds the network and runs one pass at a time. The engine says of each pass whether it is the step's last
on this rank: gradients are reduced in that one alone, and its forward and backward run in the same state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Protocol

from torch import Tensor, nn

from pliant.engine.backends.ddp import DataParallel
from pliant.engine.backends.single import Single
from pliant.engine.ranks import Ranks
from pliant.errors import UserError
from pliant.recipe import Pass


class Backend(Protocol):
    """One way to run passes and reduce their gradients."""

    averaged: int
    """Gradients come out divided by this many ranks; the engine multiplies losses by it."""

    def forward(self, passes: Iterator[Pass], *, reduces: bool) -> Pass | None:
        """The next pass of an iteration; None if there is none."""

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of the pass that `forward` gave; Collective if it reduces."""


def wrap(net: nn.Module, ranks: Ranks, kind: Literal["auto", "single", "ddp"]) -> Backend:
    """Collective. The backend for a network whose learning parameters are set.

    Raises:
        UserError: the backend cannot serve this number of ranks.
    """
    if kind == "single" and ranks.count > 1:
        raise UserError(f"--backend single serves one rank, and {ranks.count} take part: write --backend ddp.")
    if kind == "ddp" and ranks.count == 1:
        raise UserError("--backend ddp needs several ranks, and one takes part: write --backend single.")
    return DataParallel(net, ranks) if ranks.count > 1 else Single(net)
