"""One process: nothing to reduce."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from pliant.recipe import Pass


class Single:
    """Runs passes as they come."""

    averaged = 1

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def forward(self, passes: Iterator[Pass], *, reduces: bool) -> Pass | None:
        """The next pass, or None."""
        return next(passes, None)

    def backward(self, loss: Tensor) -> None:
        """Accumulates its gradient."""
        loss.backward()
