"""Mixed precision by autocast over fp32 weights; in fp16 with a scaled loss.

Per optimizer step there is one unscale, one step and one update of the scale, whatever the number of passes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The type that forwards compute in, and the scale of the loss where that type needs one."""

    def __init__(self, name: Literal["fp32", "bf16", "fp16", "fp64"], device: torch.device) -> None:
        self.name = name
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward and its loss."""
        if self.name in ("fp32", "fp64"):
            return nullcontext()
        return torch.autocast(self._device.type, dtype=_TYPES[self.name])

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    @property
    def scale(self) -> float:
        """The factor on losses, and so on gradients, now."""
        return 1.0 if self._scaler is None else float(self._scaler.get_scale())

    def observe(self, nonfinite: Tensor) -> None:
        """The update of the scale alone, where a backend unscales and steps by itself: as `step` would."""
        if self._scaler is not None:
            self._scaler.scale(nonfinite)  # makes its tensors, the first time
            self._scaler._per_optimizer_states[0]["found_inf_per_device"] = {self._device: nonfinite}
            self._scaler.update()

    def unscale(self, optimizer: Optimizer) -> None:
        """Takes the scale out of the gradients, once all passes have run and ranks are reduced."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, nonfinite: Tensor) -> None:
        """The optimizer's step, left out on the device if `nonfinite` is 1; then the update of the scale."""
        optimizer.found_inf = nonfinite  # type: ignore[attr-defined] # read by fused optimizers
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {} if self._scaler is None else self._scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Takes a checkpoint's state."""
        if self._scaler is not None:
            self._scaler.load_state_dict(state)
