"""A residual network with gates: which blocks run is asked, acted on and recorded block by block.

Shapes: B images, C channels, H W pixels, K classes, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pliant.networks.gates import Gates
from pliant.networks.resnet import ResidualNet, Run, cost

Act = Callable[[int, Tensor], Tensor]
"""From a block's number and logits (B,) to how far it is open, (B,) in [0, 1]."""


@dataclass(frozen=True)
class Walk:
    """What a forward of a gated network came to."""

    logits: Tensor
    """(B, K)."""
    open: Tensor
    """(B, N): how far each block was open; 1 where there is no gate."""
    gate_logits: Tensor
    """(B, N'): what the gates said, of the blocks that have one."""


class GatedNet(nn.Module):
    """A backbone, and the gates of its blocks from `first` on."""

    def __init__(self, backbone: ResidualNet, gates: Gates, first: int = 0) -> None:
        super().__init__()
        self.backbone, self.gates, self.first = backbone, gates, first

    @property
    def number_of_blocks(self) -> int:
        """N, with those that have no gate."""
        return self.backbone.spec.number_of_blocks

    def forward(self, images: Tensor, act: Act, run: Run, scale: float | None = None) -> Walk:
        """Images (B, 3, H, W) to logits, and what the gates decided.

        Args:
            act: makes a decision of a gate's logits.
            run: how a decision is carried out.
            scale: the user's wish, for gates that heed it.
        """
        ask = self.gates.begin(images, scale)
        opened: list[Tensor] = []
        said: list[Tensor] = []

        def decide(number: int, x: Tensor) -> Tensor | None:
            if number < self.first:
                opened.append(x.new_ones(len(x)))
                return None
            logits = full(ask(number, x))
            gate = act(number, logits)
            said.append(logits)
            opened.append(gate)
            return gate

        logits = self.backbone(images, decide, run)
        return Walk(logits, torch.stack([full(one) for one in opened], 1), torch.stack(said, 1))

    def macs(self, opened: Tensor, side: int) -> Tensor:
        """Multiply-accumulates of each image, (B,), gates and policy included.

        Args:
            opened: (B, N), 0 or 1.
            side: pixels a side of the images.
        """
        backbone = cost(self.backbone, side)
        always = backbone.always + sum(self.gates.macs(self.backbone, side))
        residual = torch.tensor(backbone.residual, dtype=torch.float64, device=opened.device)
        return always + opened.double() @ residual


def full(values: Tensor) -> Tensor:
    """In fp32 at least: probabilities near 0 and 1 do not survive half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def threshold(number: int, logits: Tensor) -> Tensor:
    """The likelier action: what a trained network does."""
    return (logits >= 0).to(logits)
