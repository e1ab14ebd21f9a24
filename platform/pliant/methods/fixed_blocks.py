"""Blocks that no image has a say in: what a method on depth has to beat (BlockDrop's Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.methods.depth import GatedRecipe
from pliant.networks.execution import Closed
from pliant.networks.gated import GatedNet, threshold
from pliant.networks.gates import Gates
from pliant.networks.resnet import ResidualNet
from pliant.randomness import Draw
from pliant.recipe import Batch, Pass, Progress

Rule = Literal["first", "random", "distribute", "given"]


@dataclass(frozen=True, kw_only=True)
class FixedBlocks(GatedRecipe):
    """Baselines of Table 1: K blocks that no image has a say in; a run of no steps evaluates without fine-tuning."""

    rule: Rule = "first"
    """first: the first K. random: K drawn once, by `draw`. distribute: evenly over the groups, each group's
    first. given: those that `blocks` lists."""
    keep: int = 10
    """K."""
    blocks: tuple[int, ...] = ()
    """Numbers of the blocks kept, from 0, for the rule given."""
    draw: int = 0
    """Which random choice."""
    closed: Closed = "around"
    """Where a closed gate stands: around the block, leaving its shortcut (SkipNet, BlockDrop), or inside it, leaving
    the ReLU of that (URNet). They differ where a shortcut has weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        number = self.network.number_of_blocks
        if self.rule != "given" and not 0 <= self.keep <= number:
            raise UserError(f"Of {number} blocks {self.keep} cannot be kept: write --recipe.keep from 0 to {number}.")
        if bool(self.blocks) != (self.rule == "given"):
            raise UserError(
                "Blocks by their numbers are the rule given, and it needs them: write --recipe.rule given "
                "--recipe.blocks 0 1 2."
            )
        if any(not 0 <= block < number for block in self.blocks):
            raise UserError(
                f"This policy is for another number of blocks: write --recipe.blocks from 0 to {number - 1}."
            )

    def kept(self) -> tuple[int, ...]:
        """The numbers of the blocks that run, in order."""
        number = self.network.number_of_blocks
        if self.rule == "given":
            return tuple(sorted(self.blocks))
        if self.rule == "first":
            return tuple(range(self.keep))
        if self.rule == "random":
            order = torch.randperm(number, generator=torch.Generator().manual_seed(self.draw))
            return tuple(sorted(order[: self.keep].tolist()))
        return distributed(self.network.blocks_of_groups, self.keep)

    def build(self, classes: int) -> nn.Module:
        backbone = self.network.build(classes)
        return GatedNet(backbone, Always(self.kept(), self.network.number_of_blocks))

    def passes(self, progress: Progress) -> int:
        return 1

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        walk = cast(GatedNet, net)(batch.images, threshold, self.masked())
        yield Pass("kept", cross_entropy(walk.logits, batch.targets, label_smoothing=self.label_smoothing))


def distributed(groups: Sequence[int], keep: int) -> tuple[int, ...]:
    """Numbers of `keep` blocks spread over groups of these sizes, as evenly as they allow; each group's first ones."""
    counts = [0] * len(groups)
    for _ in range(keep):
        open_groups = [index for index, size in enumerate(groups) if counts[index] < size]
        counts[min(open_groups, key=lambda index: counts[index])] += 1
    starts = [sum(groups[:index]) for index in range(len(groups))]
    return tuple(start + index for start, count in zip(starts, counts, strict=True) for index in range(count))


class Always(Gates):
    """The same answer for every image."""

    def __init__(self, kept: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.answer = [1.0 if number in kept else -1.0 for number in range(blocks)]

    def begin(self, images: Tensor, scale: float | None) -> Callable[[int, Tensor], Tensor]:
        return lambda number, x: x.new_full((len(x),), self.answer[number])

    def macs(self, backbone: ResidualNet, side: int) -> tuple[int, ...]:
        return (0,) * len(self.answer)

    def lean(self, logit: float) -> None:
        """They stay as they were given."""
