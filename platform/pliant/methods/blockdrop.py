"""BlockDrop (Wu et al., CVPR 2018, arXiv 1711.08393): a small network looks at the image and says which blocks to run.

It learns by policy gradient on a frozen residual network, from the last blocks to the first, and then together with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.methods.depth import GatingRecipe
from pliant.methods.reinforce import bounded, entropy, log_probability, policy_loss, sample
from pliant.networks.gated import GatedNet, full
from pliant.networks.gates import Ask, ClassPolicy, Gates, Policy, make_gates
from pliant.networks.resnet import Decide, ResidualNet, ResNet
from pliant.randomness import Draw
from pliant.recipe import Batch, Measurement, Pass, Progress, Stage


@dataclass(frozen=True, kw_only=True)
class BlockDrop(GatingRecipe):
    """Algorithm 1: curriculum, then joint fine-tuning; before them, if asked, the policy network learns the classes."""

    decide: Literal["once", "block by block", "recurrent"] = "once"
    """once: a policy network, ahead of all blocks. block by block: from each block's averaged input, the sequential
    variant of Table 2. recurrent: the same through an LSTM along the depth (section 4.1)."""
    gamma: float = 1.0
    """Penalty of a wrong answer in the curriculum (Eq. 3), which a reward has as -gamma: 1 in the authors' code; the
    paper prints none."""
    gamma_from: float | None = None
    """The same at the curriculum's start, from where it grows by a like factor each step: while wrong answers cost
    little, blocks are dropped at all, and then it pays to be right. Default: gamma throughout."""
    joint_gamma: float = 5.0
    """The same in joint fine-tuning: 5 in the authors' code, 10 for ResNet-110."""
    alpha: float = 0.8
    """Bound on the sampled probabilities, in (0.5, 1): they stay in [1 - alpha, alpha]."""
    baseline: Literal["greedy", "none"] = "greedy"
    """greedy: the reward of the likeliest policy is taken off (Eq. 6)."""
    curriculum: bool = True
    """Let the last blocks be decided first, and one more from time to time (section 3.3)."""
    grow: float = 0.5
    """Share of the curriculum stage after which all blocks are decided: K epochs in the paper."""
    entropy: float = 0.0
    """Weight of an entropy bonus in the curriculum; 0.1 in the authors' code, absent from the paper."""
    policy_share: float = 0.0
    """Share of the run in which the policy network first learns to tell the classes apart; the curriculum then trains a
    layer behind it, which holds the decisions of each class. That takes some hundred steps, where the paper's policy
    network learns all of it from rewards in 5,000 epochs. In joint fine-tuning that layer learns on and what tells the
    classes stays frozen: rewards would unlearn them. 0: as the paper has it."""
    doubt: float = 1.0
    """Beside a policy share: all blocks run where the policy network gives its likeliest class a chance of more than
    this to be wrong, for instance 0.2; a search that changes one block at a time does not come upon that. 1: never."""
    curriculum_rate: float = 1.0
    """Factor on the learning rate in the curriculum."""
    curriculum_share: float = 0.7
    """Share of the run with the residual network frozen: 5,000 of 7,000 epochs."""
    joint_rate: float = 1.0
    """Factor on the learning rate in joint fine-tuning: 0.1 on ImageNet."""
    curriculum_batch: int = 1
    """Images of a step in the curriculum, as a multiple of the run's: 2,048 and then 256 on CIFAR in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_0("gamma", "joint_gamma", "entropy")
        if not 0.5 < self.alpha < 1.0:
            raise UserError(
                f"An alpha of {self.alpha:g} leaves no exploration: write --recipe.alpha in (0.5, 1), for instance 0.8."
            )
        if not 0.0 < self.curriculum_share < 1.0:
            raise UserError(
                f"With a --recipe.curriculum-share of {self.curriculum_share:g} a stage trains nothing: write one in "
                "(0, 1)."
            )
        if self.policy_share < 0.0 or not self.policy_share + self.curriculum_share < 1.0:
            raise UserError(
                f"With a --recipe.policy-share of {self.policy_share:g} beside a --recipe.curriculum-share of "
                f"{self.curriculum_share:g} nothing is left for joint fine-tuning: write two whose sum is below 1."
            )
        if self.policy_share and self.decide != "once":
            raise UserError(
                "Deciding block by block there is no policy network to train first: leave --recipe.policy-share out."
            )
        if self.gamma_from is not None and not (self.gamma_from > 0 and self.gamma > 0):
            raise UserError(
                f"A penalty grows from {self.gamma_from:g} to {self.gamma:g} by a like factor each step: write "
                "--recipe.gamma-from and --recipe.gamma above 0."
            )
        if not 0.0 < self.doubt <= 1.0:
            raise UserError(f"A chance lies in (0, 1], not {self.doubt:g}: write for instance --recipe.doubt 0.2.")
        if self.doubt < 1.0 and not self.policy_share:
            raise UserError(
                "--recipe.doubt asks a policy network that learned the classes first: write --recipe.policy-share "
                "beside it, for instance 0.5, or leave it out."
            )
        if self.curriculum_batch < 1:
            raise UserError(
                f"A step cannot have {self.curriculum_batch} times its images: write --recipe.curriculum-batch 1 or "
                "more."
            )
        if not 0.0 < self.grow <= 1.0:
            raise UserError(f"A share of the stage lies in (0, 1]: write --recipe.grow so, not {self.grow:g}.")

    def build(self, classes: int) -> nn.Module:
        backbone = self.network.build(classes)
        return self.gated(backbone, self._gates(backbone))

    def _gates(self, backbone: ResidualNet) -> Gates:
        if self.decide != "once":
            return make_gates("rnn" if self.decide == "recurrent" else "pooled", backbone, 0)
        imagenet, blocks = self.network.form == "imagenet", self.network.number_of_blocks
        spec = ResNet(form="imagenet", depth=10) if imagenet else ResNet(depth=8, shortcut="pool")
        if self.policy_share:
            return ClassPolicy(spec, blocks, backbone.classes, pool=2 if imagenet else 1, doubt=self.doubt)
        return Policy(spec, blocks, pool=2 if imagenet else 1)

    def stages(self) -> tuple[Stage, ...]:
        stages = (
            Stage(name="classify", learns=("gates.net",), share=self.policy_share),
            Stage(
                name="curriculum",
                learns=("gates.fc",) if self.policy_share else ("gates",),
                share=self.curriculum_share,
                learning_rate=self.curriculum_rate,
                batch=self.curriculum_batch,
            ),
            Stage(
                name="joint",
                learns=("backbone", "gates.fc") if self.policy_share else ("",),
                share=1.0 - self.policy_share - self.curriculum_share,
                learning_rate=self.joint_rate,
            ),
        )
        return stages if self.policy_share else stages[1:]

    def score(self, spectrum: Sequence[Measurement]) -> float:
        """Eq. 3 of the mean number of blocks, with the penalty of fine-tuning: top-1 alone is best with all blocks."""
        (line,) = spectrum
        used = line.figures["blocks"] / self.network.number_of_blocks
        return line.top1 * (1.0 - used**2) - self.joint_gamma * (1.0 - line.top1)

    def admits_mixing(self) -> str | None:
        return "BlockDrop rewards right answers, and a mixed image has none"

    def passes(self, progress: Progress) -> int:
        return 1

    def decided(self, progress: Progress) -> int:
        """t: how many of the last blocks the policy decides; the others run (Algorithm 1, line 7)."""
        blocks = self.network.number_of_blocks
        if not self.curriculum or self._stage(progress) != "curriculum":
            return blocks
        return min(blocks, 1 + int(progress.stage_share / self.grow * blocks))

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        gated = cast(GatedNet, net)
        generator = draw.generator(batch.images.device, "policy")
        match self._stage(progress):
            case "classify":
                loss = cross_entropy(cast(ClassPolicy, gated.gates).classes(batch.images), batch.targets)
                yield Pass("classes", loss)
            case "curriculum":
                yield self._curriculum(gated, batch, generator, self.decided(progress), self.penalty(progress))
            case _:
                yield self._joint(gated, batch, generator)

    def penalty(self, progress: Progress) -> float:
        """gamma of Eq. 3, in the curriculum."""
        if self.gamma_from is None:
            return self.gamma
        return float(self.gamma_from * (self.gamma / self.gamma_from) ** progress.stage_share)

    def _stage(self, progress: Progress) -> str:
        return self.stages()[progress.stage].name

    def _curriculum(self, net: GatedNet, batch: Batch, generator: torch.Generator, decided: int, gamma: float) -> Pass:
        """The policy alone learns. What runs for all images runs once, for both roll-outs."""
        first = net.number_of_blocks - decided
        backbone = net.backbone
        with torch.no_grad():
            shared = backbone.walk(backbone.stem(batch.images), range(first), None, None)
        rest = range(first, net.number_of_blocks)

        def roll_out(decide: Decide) -> Tensor:
            with torch.no_grad():
                # Masked: were a block that no image of a rank keeps left out, ranks would run unlike layers (ZeRO 3).
                x = backbone.walk(shared, rest, decide, self.masked())
                answer: Tensor = backbone.fc(backbone.embed(x))
            return answer

        ask = net.gates.begin(batch.images, None)
        probabilities: list[Tensor] = []
        actions: list[Tensor] = []

        def sampled(number: int, x: Tensor) -> Tensor:
            with torch.enable_grad():
                bound = bounded(full(ask(number, x)).sigmoid(), self.alpha)
            probabilities.append(bound)
            actions.append(sample(bound, generator))
            return actions[-1]

        logits = roll_out(sampled)
        reward = self.reward(logits, batch.labels, torch.stack(actions, 1), first, gamma)
        again = self._asked_again(net, batch.images, ask)
        advantage = reward - self._greedy_reward(again, batch.labels, roll_out, first, gamma)
        probability = torch.stack(probabilities, 1)
        loss = policy_loss(log_probability(probability, torch.stack(actions, 1)), advantage)
        if self.entropy:
            loss = loss - self.entropy * entropy(probability).sum(1).mean()
        return Pass("policy", loss, self._metrics(reward, advantage, torch.stack(actions, 1), first))

    def _asked_again(self, net: GatedNet, images: Tensor, said: Ask) -> Ask:
        """For a second roll-out: what was said once for all blocks, or gates that decide in turn, from the start."""
        return said if self.decide == "once" else net.gates.begin(images, None)

    def _greedy_reward(
        self, ask: Ask, labels: Tensor, roll_out: Callable[[Decide], Tensor], always: int, gamma: float
    ) -> Tensor:
        """R of the likeliest policy, (B,); 0 without a baseline."""
        if self.baseline == "none":
            return torch.zeros(len(labels), device=labels.device)
        opened: list[Tensor] = []

        def greedy(number: int, x: Tensor) -> Tensor:
            opened.append((ask(number, x) >= 0).to(x))
            return opened[-1]

        with torch.no_grad():
            logits = roll_out(greedy)
            return self.reward(logits, labels, torch.stack(opened, 1), always, gamma)

    def _joint(self, net: GatedNet, batch: Batch, generator: torch.Generator) -> Pass:
        """Policy and residual network learn together, on the sampled blocks."""
        probabilities: list[Tensor] = []

        def sampled(number: int, logits: Tensor) -> Tensor:
            bound = bounded(logits.sigmoid(), self.alpha)
            probabilities.append(bound)
            return sample(bound, generator)

        walk = net(batch.images, sampled, self.masked())
        supervised = cross_entropy(walk.logits, batch.targets, label_smoothing=self.label_smoothing)
        reward = self.reward(walk.logits.detach(), batch.labels, walk.open, 0, self.joint_gamma)
        # The baseline normalises as the sampled pass does, but leaves the running statistics alone.
        buffers = {name: buffer.clone() for name, buffer in net.backbone.named_buffers()}

        def roll_out(decide: Decide) -> Tensor:
            answer: Tensor = functional_call(net.backbone, buffers, (batch.images, decide, self.masked()))
            return answer

        said = walk.gate_logits.detach()
        again = self._asked_again(net, batch.images, lambda number, x: said[:, number])
        advantage = reward - self._greedy_reward(again, batch.labels, roll_out, 0, self.joint_gamma)
        likely = log_probability(torch.stack(probabilities, 1), walk.open)
        loss = supervised + policy_loss(likely, advantage)
        metrics = {"cross_entropy": supervised.detach()} | self._metrics(reward, advantage, walk.open, 0)
        return Pass("joint", loss, metrics)

    def reward(self, logits: Tensor, labels: Tensor, opened: Tensor, always: int, gamma: float) -> Tensor:
        """Eq. 3, (B,): 1 - (|u| / K)^2 for a right answer, -gamma for a wrong one.

        Args:
            logits: (B, K).
            labels: (B,).
            opened: (B, N'), of the decided blocks.
            always: blocks that run besides.
            gamma: penalty.
        """
        used = (opened.sum(1) + always) / self.network.number_of_blocks
        right = logits.argmax(1) == labels
        return torch.where(right, 1.0 - used.square(), torch.full_like(used, -gamma))

    @staticmethod
    def _metrics(reward: Tensor, advantage: Tensor, opened: Tensor, always: int) -> dict[str, Tensor]:
        return {
            "reward": reward.mean(),
            "advantage_sd": advantage.std(unbiased=False),
            "blocks": opened.sum(1).mean() + always,
        }
