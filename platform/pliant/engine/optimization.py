"""What learns, how fast, and the update at the end of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from pliant.engine.precision import Precision
from pliant.errors import UserError
from pliant.experiment import Optimization
from pliant.recipe import ScheduleName, Stage


def set_learning(net: nn.Module, stage: Stage) -> None:
    """Puts the network into training for a stage: what does not learn is frozen and in evaluation mode.

    Raises:
        UserError: a prefix of the stage names no parameter.
    """
    names = [name for name, _ in net.named_parameters()]
    for prefix in stage.learns:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"Stage {stage.name} learns {prefix!r}, but no parameter's name begins so.")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(stage.learns))
    net.train()
    _freeze_modes(net)


def _freeze_modes(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _freeze_modes(child)


def decays(parameter: nn.Parameter, rule: Literal["kernels", "all"]) -> bool:
    """Whether weight decay acts on it. kernels: as the authors of US-Nets, 4-D weights over several inputs (so not
    depthwise) and 2-D weights."""
    if rule == "all" or parameter.ndim == 2:
        return True
    return parameter.ndim == 4 and parameter.shape[1] != 1


def make_optimizer(net: nn.Module, config: Optimization) -> Optimizer:
    """Over what learns, in two groups, with and without decay. Fused: a step is one call, and can be left out on the
    device without the host waiting to know."""
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in learning if decays(p, config.decay)], "weight_decay": config.weight_decay},
        {"params": [p for p in learning if not decays(p, config.decay)], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=True)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
        fused=True,
    )


def with_momentum(optimizer: Optimizer) -> Optimizer:
    """The same optimizer, SGD's momentum beginning at zero.

    Torch would make it in the first step, and leave memory as it finds it if that step is left out on the device
    (2.13, fused). The first step comes to the same bits.
    """
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def placed(value: Any, parameter: Tensor) -> Any:
    """A copy of one value of an optimizer's state, where a fused step looks for it: on the parameter's device, and in
    its memory layout if it is as large."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape:
        return torch.empty_like(parameter).copy_(value)
    return value.to(parameter.device, copy=True)


def learning_rate(step: int, steps: int, warmup: int, schedule: ScheduleName, floor: float = 0.0) -> float:
    """Factor on the peak learning rate for a step of a stage, in [0, 1].

    Args:
        step: steps done in the stage, from 0.
        steps: steps of the stage in all.
        warmup: of these, steps that climb linearly to the peak.
        schedule: what follows, from 1 towards `floor`, which it would reach at `steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    fall = {
        "linear": 1.0 - share,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
        "steps": 0.1 ** ((share >= 0.5) + (share >= 0.75)),
        "constant": 1.0,
    }[schedule]
    return floor + (1.0 - floor) * fall


@dataclass(frozen=True)
class Update:
    """What an update did, on the device."""

    norm: Tensor
    """Norm of the reduced gradient before clipping, a scalar."""
    nonfinite: Tensor
    """1.0 if the gradient was not finite and the step was left out, else 0.0; a scalar."""


def update(optimizer: Optimizer, precision: Precision, *, lr: float, clip: float | None) -> Update:
    """Clips the reduced gradient, steps, and clears it. Nothing here waits for the device.

    A gradient that is not finite is so on every rank, since it is the reduced one: the step is left out on all.
    """
    precision.unscale(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm(gradients, error_if_nonfinite=False)
    nonfinite = (~torch.isfinite(norm)).float()
    if clip is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    precision.step(optimizer, nonfinite)
    optimizer.zero_grad(set_to_none=True)
    return Update(norm.detach(), nonfinite)
