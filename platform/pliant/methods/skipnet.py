"""SkipNet (Wang et al., ECCV 2018, arXiv 1711.09485): gates between residual blocks, which look at the features so far.

Supervised pre-training decides hard and learns softly (Eq. 7); hybrid reinforcement learning then samples decisions,
and rewards skipping and right answers together (Eq. 6). The first block always runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.methods.depth import GatingRecipe
from pliant.methods.reinforce import log_probability, policy_loss, returns_to_go, sample
from pliant.networks.gated import GatedNet, Walk
from pliant.networks.gates import GateKind, make_gates
from pliant.networks.resnet import cost
from pliant.randomness import Draw
from pliant.recipe import Batch, Measurement, Outcome, Pass, Point, Progress, ScheduleName, Stage

Learning = Literal["sp+hrl", "sp", "hrl", "rl", "soft", "sdv"]


@dataclass(frozen=True, kw_only=True)
class SkipNet(GatingRecipe):
    """Algorithm 1: supervised pre-training (SP), then hybrid reinforcement learning (HRL)."""

    gate: Literal["auto", "ff1", "ff2", "rnn", "pooled"] = "rnn"
    """Fig. 3: convolutions (ff1, and the cheaper ff2), or one recurrent gate, which the paper found best; pooled has no
    convolutions. auto: ff2 above depth 100, else ff1, as the paper chooses between these two."""
    learning: Learning = "sp+hrl"
    """sp+hrl: the method. sp: the first half alone. hrl: from a random start (section 4.3). rl: the answer too is a
    sampled action, and there is no supervision. soft: gates stay continuous in training (Table 3). sdv: blocks are
    dropped at random in training and in test alike (Fig. 6)."""
    sp_share: float = 0.8
    """Share of the run in pre-training."""
    hrl_rate: float = 1e-3
    """Factor on the learning rate in HRL: 1e-4 after 0.1 in the paper (section 4)."""
    hrl_schedule: ScheduleName = "constant"
    """Its shape there: the paper names none; a short run at a higher rate wants to end low."""
    alpha: float = 1.0
    """Weight of what is skipped (Eq. 5)."""
    beta: float | None = 1.0
    """Weight of the image's loss in the return of HRL; None: alpha / N, as on ImageNet (section 3.2)."""
    rl_weight: float = 0.01
    """Factor on all returns in HRL; 1 in Eq. 6, 0.01 in the authors' code."""
    costs: Literal["equal", "macs"] = "equal"
    """C_i: 1 for each block, or in proportion to its multiply-accumulates, with mean 1."""
    temperature: float = 1.0
    """Divides the gates' logits in HRL: below 1 sampled decisions are nearer to the pre-trained ones. 0.05 on ImageNet
    in the authors' code, where the last layer of each gate is divided by it once and then learned; here it is divided
    in each step, and that layer's steps have 1 / temperature**2 times the effect of theirs."""
    sdv_rate: float = 0.5
    """Share of blocks kept by sdv, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_0("alpha", "beta", "rl_weight")
        if not 0.0 < self.sp_share < 1.0:
            raise UserError(f"A stage that trains nothing: write --recipe.sp-share in (0, 1), not {self.sp_share:g}.")
        if not 0.0 < self.sdv_rate <= 1.0:
            raise UserError(f"A share of blocks lies in (0, 1]: write --recipe.sdv-rate so, not {self.sdv_rate:g}.")
        if self.learning == "rl" and self.label_smoothing:
            raise UserError(
                "Reinforcement learning alone has no loss of the labels to smooth: leave --recipe.label-smoothing out."
            )
        if self.temperature <= 0.0:
            raise UserError(f"A temperature lies above 0, not {self.temperature:g}: write --recipe.temperature 1.")

    def build(self, classes: int) -> nn.Module:
        backbone = self.network.build(classes)
        kind: GateKind = ("ff2" if self.network.depth > 100 else "ff1") if self.gate == "auto" else self.gate
        return self.gated(backbone, make_gates(kind, backbone, first=1), first=1)

    def stages(self) -> tuple[Stage, ...]:
        if self.learning == "sp+hrl":
            return (
                Stage(name="sp", share=self.sp_share),
                Stage(name="hrl", share=1.0 - self.sp_share, learning_rate=self.hrl_rate, schedule=self.hrl_schedule),
            )
        return (Stage(name=self.learning),)

    def score(self, spectrum: Sequence[Measurement]) -> float:
        """Where skipping is rewarded the reward of Eq. 5, of the means, all C_i alike: top-1 alone is best with all
        blocks."""
        if self.learning not in ("sp+hrl", "hrl", "rl"):
            return super().score(spectrum)
        (line,) = spectrum
        skipped = (self.network.number_of_blocks - line.figures["blocks"]) / (self.network.number_of_blocks - 1)
        answer = line.top1 if self.learning == "rl" else -line.loss
        return answer + self.alpha * skipped if math.isfinite(answer) else -math.inf

    def admits_mixing(self) -> str | None:
        if all(stage.name not in ("hrl", "rl") for stage in self.stages()):
            return None
        return f"SkipNet with --recipe.learning {self.learning} rewards right answers, and a mixed image has none"

    def passes(self, progress: Progress) -> int:
        return 1

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        gated, name = cast(GatedNet, net), self.stages()[progress.stage].name
        if name in ("hrl", "rl"):
            yield self._reinforced(gated, batch, draw, name)
            return
        act = {"sp": straight_through, "soft": soft, "sdv": self._dropped(draw.generator(batch.images.device, "sdv"))}[
            name
        ]
        walk: Walk = gated(batch.images, act, self.masked())
        loss = cross_entropy(walk.logits, batch.targets, label_smoothing=self.label_smoothing)
        yield Pass(name, loss, {"blocks": walk.open.sum(1).mean()})

    def _reinforced(self, net: GatedNet, batch: Batch, draw: Draw, name: str) -> Pass:
        """Eq. 6: the loss along the sampled path, and the policy gradient with the rewards still to come."""
        generator = draw.generator(batch.images.device, "gates")
        walk: Walk = net(batch.images, self._sampled(generator), self.masked())
        probability = (walk.gate_logits / self.temperature).sigmoid()
        actions = walk.open[:, net.first :].detach()
        likely = log_probability(probability, actions)
        skipped = (1 - actions) * self._costs(net, batch.images.shape[-1], actions)
        each = self.alpha / actions.shape[1]
        rewards = each * skipped
        per_image = cross_entropy(walk.logits, batch.targets, reduction="none", label_smoothing=self.label_smoothing)
        if name == "hrl":
            beta = each if self.beta is None else self.beta
            returns = returns_to_go(rewards, -beta * per_image.detach())
            loss = per_image.mean() + self.rl_weight * policy_loss(likely, returns)
        else:
            answer = torch.multinomial(walk.logits.detach().softmax(1), 1, generator=generator)[:, 0]
            right = (answer == batch.labels).float()
            chosen = walk.logits.log_softmax(1).gather(1, answer[:, None])
            loss = policy_loss(torch.cat([likely, chosen], 1), _with_answer(returns_to_go(rewards, right), right))
        return Pass(name, loss, {"blocks": walk.open.sum(1).mean(), "cross_entropy": per_image.detach().mean()})

    def _costs(self, net: GatedNet, side: int, like: Tensor) -> Tensor:
        """C_i of each gated block, (1, N)."""
        if self.costs == "equal":
            return like.new_ones(1, like.shape[1])
        macs = like.new_tensor(cost(net.backbone, side).residual[net.first :])
        return (macs / macs.mean())[None]

    def _sampled(self, generator: torch.Generator) -> Callable[[int, Tensor], Tensor]:
        return lambda number, logits: sample((logits / self.temperature).sigmoid(), generator)

    def _dropped(self, generator: torch.Generator) -> Callable[[int, Tensor], Tensor]:
        """Whole blocks at random for each image, whatever the gate says; it learns nothing."""
        return lambda number, logits: sample(torch.full_like(logits, self.sdv_rate), generator)

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        if self.learning != "sdv":
            return super().predict(net, images, point)
        gated, act = cast(GatedNet, net), self._dropped(content_generator(images))
        return self.outcome(gated, images, gated(images, act, self.executed()))


def straight_through(number: int, logits: Tensor) -> Tensor:
    """Eq. 7: the likelier action forward, the probability's gradient backward."""
    probability = logits.sigmoid()
    return (probability >= 0.5).to(probability) + probability - probability.detach()


def soft(number: int, logits: Tensor) -> Tensor:
    """The probability itself."""
    return logits.sigmoid()


def content_generator(images: Tensor) -> torch.Generator:
    """Draws that depend on the images alone, so that a random baseline measures the same twice."""
    seed = int(images.detach().double().abs().sum().item() * 1e3) % 2**62
    return torch.Generator(images.device).manual_seed(seed)


def _with_answer(returns: Tensor, right: Tensor) -> Tensor:
    """The answer is the last action, and its return its own reward."""
    return torch.cat([returns, right[:, None]], 1)
