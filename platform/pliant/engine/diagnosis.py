"""Where a value that is not finite first came up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class Finding:
    """The first layer whose output, or else whose gradient, was not finite."""

    def __init__(self) -> None:
        self.output: str | None = None
        self.gradient: str | None = None

    def __str__(self) -> str:
        if self.output is not None:
            return f"the output of {self.output} was the first that is not finite"
        if self.gradient is not None:
            return f"the gradient at the output of {self.gradient} was the first that is not finite"
        return "every layer's output and its gradient were finite: it is the loss, or the sum of the passes' gradients"


@contextmanager
def watching(net: nn.Module) -> Iterator[Finding]:
    """Looks at each layer as it runs; slow, as it waits for the device at each."""
    finding = Finding()
    handles = []
    for name, module in net.named_modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_hook(partial(_see_output, finding, name)))
    try:
        yield finding
    finally:
        for handle in handles:
            handle.remove()


def _see_output(finding: Finding, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor):
        return
    if finding.output is None and not torch.isfinite(output).all():
        finding.output = name
    if output.requires_grad:
        output.register_hook(partial(_see_gradient, finding, name))


def _see_gradient(finding: Finding, name: str, gradient: Tensor) -> None:
    if finding.gradient is None and not torch.isfinite(gradient).all():
        finding.gradient = name
