"""URNet (Lee et al., AAAI 2020): gates that heed a scale which the user may change at run time.

A gate is a sigmoid with probability p in training, and then learns; else it is a step, and the block learns what it is
to be left out. A scale loss draws the share of open blocks to the wish S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.methods.depth import GatingRecipe
from pliant.methods.reinforce import sample
from pliant.methods.skipnet import content_generator
from pliant.networks.execution import Closed
from pliant.networks.gated import GatedNet, Walk
from pliant.networks.gates import ConditionalGate, GatePerBlock, Gates, Policy, Reading
from pliant.networks.resnet import ResidualNet, ResNet
from pliant.randomness import Draw
from pliant.recipe import Batch, Outcome, Pass, Point, Progress, Scale, Stage

Variant = Literal["urnet", "external", "random_test", "random", "attention"]


@dataclass(frozen=True, kw_only=True)
class URNet(GatingRecipe):
    """Gating modules first, then everything; S drawn anew in each iteration (section Training CGM)."""

    variant: Variant = "urnet"
    """Rows of Table 1. urnet: the method; with p = 1 its row SG, with p = 0 its row BG. external: a ResNet-8 decides
    from the image and the scale. random_test: plain training, blocks dropped at random in test only. random: in
    training too. attention: sigmoids in training and in test, and blocks dropped at random (ResNet + B/A)."""
    reduction: int = 2
    """r of the gating module: 2 on CIFAR, 16 on ImageNet."""
    p: float = 0.1
    """Probability that a gate is a sigmoid in training, drawn for each gate and iteration."""
    gates_p: float | None = None
    """The same while only the gates learn; default: p. Few epochs need a larger one: 0.5."""
    beta: float = 2.0
    """Weight of the scale loss (Eq. 5): 2 in Table 1, 4 on ImageNet."""
    smallest: float = 0.2
    """Smin of the scales drawn in training."""
    largest: float = 1.0
    """Smax."""
    standardise: bool = False
    """Gates read S less its mean in training, over its deviation there. They read S itself as the paper has it: then
    what differs with S is small beside what does not (0.6 and, about it, 0.23), so that gates first learn the mean
    share, are sure of it, and take long to follow S. With this they do so within an epoch."""
    gates_share: float = 0.2
    """Share of the run in which only the gates learn: 100 of 500 epochs on CIFAR."""
    joint_rate: float = 1.0
    """Factor on the learning rate afterwards."""
    per_image: bool = True
    """Eq. 4 for each image, then averaged; else of the batch's mean."""
    fixed: float | None = None
    """Train for this one scale: the target falls from 1 along a cosine as the run begins, with Gaussian noise."""
    anneal: float = 0.01
    """Share of the run in which it falls: 5 epochs in the paper, of 500 on CIFAR and 20 on ImageNet."""
    noise: float = 0.1
    """Standard deviation of the scale around the target, in `fixed`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_0("beta")
        for name, value in (("p", self.p), ("gates-p", self.gates_p)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise UserError(f"A probability lies in [0, 1]: write --recipe.{name} so, not {value:g}.")
        if not 0.0 <= self.smallest <= self.largest <= 1.0:
            raise UserError(
                f"Scales lie in [0, 1], the smaller first: got {self.smallest:g} and {self.largest:g} as "
                "--recipe.smallest and --recipe.largest."
            )
        if not 0.0 < self.anneal <= 1.0:
            raise UserError(f"A share of the run lies in (0, 1]: write --recipe.anneal so, not {self.anneal:g}.")
        if self.noise < 0.0:
            raise UserError(f"Noise cannot have the deviation {self.noise:g}: write --recipe.noise 0 or more.")
        if self.reduction < 1:
            raise UserError(f"A gate cannot be reduced by {self.reduction}: write --recipe.reduction 1 or more.")
        if self.gates_p == 0.0 and len(self.stages()) > 1:
            raise UserError(
                "With --recipe.gates-p 0 all gates are steps while only gates learn: that stage trains nothing. Write "
                "one above 0, or --recipe.p 0 for training without it."
            )
        if self.standardise and (self.fixed is not None or self.smallest == self.largest):
            raise UserError(
                "Trained for one scale, gates have no deviation to divide by: leave --recipe.standardise out."
            )
        if self.variant == "attention" and self.execution != "masked":
            raise UserError(
                "Attention multiplies each block that runs by its sigmoid, which only masked execution does: leave "
                "--execution out."
            )
        if self.fixed is not None and not 0.0 < self.fixed <= 1.0:
            raise UserError(f"A scale lies in (0, 1]: write --recipe.fixed so, not {self.fixed:g}.")
        if not 0.0 < self.gates_share < 1.0:
            raise UserError(
                f"A stage that trains nothing: write --recipe.gates-share in (0, 1), not {self.gates_share:g}."
            )
        if self.p == 0.0 and self.variant in ("urnet", "external") and self.open_rate is not None:
            raise UserError("With --recipe.p 0 no gate learns, and --recipe.open-rate would decide all: leave it out.")

    @property
    def closed(self) -> Closed:
        return "inside"

    def build(self, classes: int) -> nn.Module:
        backbone = self.network.build(classes)
        return self.gated(backbone, self._gates(backbone))

    def _gates(self, backbone: ResidualNet) -> Gates:
        if self.variant == "external":
            imagenet = self.network.form == "imagenet"
            spec = ResNet(form="imagenet", depth=18) if imagenet else ResNet(depth=8, shortcut="pool")
            return Policy(spec, self.network.number_of_blocks, pool=2 if imagenet else 1, reading=self._reading())
        gates = [ConditionalGate(block.inputs, self.reduction, self._reading()) for block in backbone.blocks()]
        return GatePerBlock(gates, 0)

    def _reading(self) -> Reading:
        if not self.standardise:
            return Reading()
        return Reading((self.smallest + self.largest) / 2, (self.largest - self.smallest) / math.sqrt(12))

    def stages(self) -> tuple[Stage, ...]:
        if self.variant in ("random_test", "random", "attention") or self.p == 0.0:
            return (Stage(name="joint"),)
        return (
            Stage(name="gates", learns=("gates",), share=self.gates_share),
            Stage(name="joint", share=1.0 - self.gates_share, learning_rate=self.joint_rate),
        )

    def passes(self, progress: Progress) -> int:
        return 1

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        scale = self.scale(draw, progress)
        walk: Walk = cast(GatedNet, net)(
            batch.images, self._act(draw, scale, batch.images, self._p(progress)), self.masked(), scale
        )
        loss = cross_entropy(walk.logits, batch.targets, label_smoothing=self.label_smoothing)
        metrics = {"cross_entropy": loss.detach(), "open": walk.open.detach().mean(), "scale": loss.new_full((), scale)}
        if self.variant in ("urnet", "external"):
            # In an iteration whose gates are all steps nothing reaches them: a zero gradient, but a graph.
            loss = loss + self.beta * self.scale_loss(walk.open, scale) + 0.0 * walk.gate_logits.sum()
        yield Pass(self.stages()[progress.stage].name, loss, metrics)

    def scale(self, draw: Draw, progress: Progress) -> float:
        """S of an iteration, the same for all its images on all ranks."""
        if self.fixed is None:
            return draw.uniform(self.smallest, self.largest, 1, "scale")[0]
        share = min(1.0, progress.run_share / self.anneal)
        target = self.fixed + (1.0 - self.fixed) * 0.5 * (1.0 + math.cos(math.pi * share))
        noise = float(draw.shared("scale").normal(0.0, self.noise))
        return min(1.0, max(0.0, target + noise))

    def scale_loss(self, opened: Tensor, scale: float) -> Tensor:
        """Eq. 4: the squared distance of the share of open blocks from S; opened (B, N)."""
        share = opened.mean(1) if self.per_image else opened.mean()
        return (share - scale).square().mean()

    def _p(self, progress: Progress) -> float:
        gates_alone = self.stages()[progress.stage].name == "gates"
        return self.gates_p if gates_alone and self.gates_p is not None else self.p

    def _act(self, draw: Draw, scale: float, images: Tensor, p: float) -> Callable[[int, Tensor], Tensor]:
        soft = draw.shared("gate activation").random(self.network.number_of_blocks) < p

        def activate(number: int, logits: Tensor) -> Tensor:
            """Sigmoid for all images, or step: the draw is the gate's, not the image's."""
            return logits.sigmoid() if soft[number] else (logits >= 0).to(logits)

        generator = draw.generator(images.device, "drop")
        return {
            "urnet": activate,
            "external": activate,
            "random_test": lambda number, logits: torch.ones_like(logits),
            "random": self._dropped(scale, generator, attended=False),
            "attention": self._dropped(scale, generator, attended=True),
        }[self.variant]

    @staticmethod
    def _dropped(scale: float, generator: torch.Generator, *, attended: bool) -> Callable[[int, Tensor], Tensor]:
        def act(number: int, logits: Tensor) -> Tensor:
            kept = sample(torch.full_like(logits, scale), generator)
            return kept * logits.sigmoid() if attended else kept

        return act

    def points(self) -> tuple[Point, ...]:
        wanted = (0.2, 0.4, 0.6, 0.8, 1.0) if self.fixed is None else (self.fixed,)
        return tuple(Scale(one) for one in wanted)

    def admits(self, point: Point) -> str | None:
        if isinstance(point, Scale):
            return None
        return f"{point} is not a scale: write S and a share of blocks from 0 to 1, for instance S0.6."

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        gated, scale = cast(GatedNet, net), cast(Scale, point).wanted
        if self.variant in ("urnet", "external"):
            return super().predict(net, images, point)
        act = self._dropped(scale, content_generator(images), attended=self.variant == "attention")
        walk: Walk = gated(images, act, self.executed(), scale)
        opened = (walk.open > 0).float()
        return Outcome(walk.logits, gated.macs(opened, images.shape[-1]), {"open": opened})
