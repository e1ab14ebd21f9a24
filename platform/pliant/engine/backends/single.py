"""One process: nothing to reduce."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from pliant.engine.optimization import Update, make_optimizer, placed, update, with_momentum
from pliant.engine.precision import Precision
from pliant.experiment import Optimization
from pliant.recipe import Pass


class Single:
    """Runs passes as they come."""

    averaged = 1
    anchored = True

    def __init__(self, net: nn.Module, optimization: Optimization, precision: Precision) -> None:
        self.net = net
        self.optimizer = with_momentum(make_optimizer(net, optimization))
        self.precision = precision
        self._clip = optimization.clip

    def step(self) -> AbstractContextManager[None]:
        """Nothing is left to do at its end."""
        return nullcontext()

    def forward(self, passes: Iterator[Pass], *, reduces: bool) -> Pass | None:
        """The next pass, or None."""
        with self.precision.autocast():
            return next(passes, None)

    def backward(self, loss: Tensor) -> None:
        """Accumulates its gradient."""
        self.precision.scaled(loss).backward()

    def gradients(self) -> dict[str, Tensor]:
        """As they lie in the parameters, without the loss's scale."""
        scale = self.precision.scale
        return {
            name: parameter.grad / scale for name, parameter in self._learning().items() if parameter.grad is not None
        }

    def update(self, lr: float) -> Update:
        """The optimizer's step on this process's copy."""
        return update(self.optimizer, self.precision, lr=lr, clip=self._clip)

    def whole(self) -> nn.Module:
        """It always is."""
        return self.net

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """By name, so that another backend can go on with it."""
        return {name: dict(self.optimizer.state.get(parameter, {})) for name, parameter in self._learning().items()}

    def load_optimizer_state(self, state: dict[str, dict[str, Any]]) -> None:
        """As if it had grown here."""
        for name, parameter in self._learning().items():
            for key, value in state.get(name, {}).items():
                self.optimizer.state[parameter][key] = placed(value, parameter)

    def close(self) -> nn.Module:
        """The network as it is."""
        return self.net

    def _learning(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.net.named_parameters() if parameter.requires_grad}
