"""What decides, image by image, which blocks of a residual network run.

Gates answer with a logit per image: the block is open with probability sigmoid(logit). `begin` looks at a batch once
and gives back `ask`, which answers block by block: what a gate remembers along the depth lives in one forward only.

Shapes: B images, C channels, H W pixels, N blocks.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.networks.resnet import ResidualNet, ResNet, cost, input_sides

Ask = Callable[[int, Tensor], Tensor]
"""From a block's number and input (B, C, H, W) to logits (B,)."""
GateKind = Literal["ff1", "ff2", "rnn", "pooled"]
_OPEN = 10.0  # a logit that leaves no question
_HIDDEN = 10  # of SkipNet's recurrent gate, both its input and its state


@dataclass(frozen=True)
class Reading:
    """How gates read the user's scale S: as (S - center) / spread; S itself by default."""

    center: float = 0.0
    spread: float = 1.0

    def beside(self, features: Tensor, scale: float | None, columns: int) -> Tensor:
        """Features (B, C) and the scale, or 1 if none is given, in so many columns more: (B, C + columns)."""
        read = ((1.0 if scale is None else scale) - self.center) / self.spread
        return torch.cat([features, features.new_full((len(features), columns), read)], 1)


class Gates(nn.Module):
    """Gates of all blocks of one network."""

    @abstractmethod
    def begin(self, images: Tensor, scale: float | None) -> Ask:
        """What answers for the blocks of this batch, images (B, 3, H, W); `scale` in [0, 1] is the user's wish."""

    @abstractmethod
    def macs(self, backbone: ResidualNet, side: int) -> tuple[int, ...]:
        """Multiply-accumulates of each block's gate, (N,), on images of `side` x `side` pixels; what is computed once
        for all blocks counts with the first."""

    @abstractmethod
    def lean(self, logit: float) -> None:
        """Sets the layers that answer so that all answers are about this one until something is learned."""


class Gate(nn.Module):
    """A gate of one block, which looks at the block's input alone: (B, C, H, W) and the scale to logits (B,)."""

    fc: nn.Linear
    """Its last layer."""

    @abstractmethod
    def macs(self, side: int) -> int:
        """Multiply-accumulates on an input of `side` x `side` pixels."""

    def lean(self, logit: float) -> None:
        """As `Gates.lean`."""
        _lean(self.fc, logit)


class GatePerBlock(Gates):
    """A gate of its own for each block from `first` on."""

    def __init__(self, gates: Sequence[Gate], first: int) -> None:
        super().__init__()
        self.first = first
        self.gates = nn.ModuleList(gates)

    def begin(self, images: Tensor, scale: float | None) -> Ask:
        def ask(number: int, x: Tensor) -> Tensor:
            answer: Tensor = self.gates[number - self.first](x, scale)
            return answer

        return ask

    def macs(self, backbone: ResidualNet, side: int) -> tuple[int, ...]:
        sides = input_sides(backbone, side)
        own = [cast(Gate, gate).macs(sides[self.first + index]) for index, gate in enumerate(self.gates)]
        return (*(0 for _ in range(self.first)), *own)

    def lean(self, logit: float) -> None:
        for gate in self.gates:
            cast(Gate, gate).lean(logit)


class ConvGate(Gate):
    """SkipNet's FFGate-I and FFGate-II (Fig. 3a, 3b): 15.6 % and 12.5 % of a basic block's cost."""

    def __init__(self, channels: int, *, pooled: bool) -> None:
        """`pooled`: FFGate-I, max pooling and two convolutions; else FFGate-II, one with stride 2."""
        super().__init__()
        self.pooled = pooled
        strides = (1, 2) if pooled else (2,)
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if pooled else []
        for stride in strides:
            layers += [nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, 2)

    def forward(self, x: Tensor, scale: float | None) -> Tensor:
        """The difference of the two classes' logits, as their softmax has it."""
        both: Tensor = self.fc(self.layers(x).mean((2, 3)))
        return both[:, 1] - both[:, 0]

    def macs(self, side: int) -> int:
        channels = self.fc.in_features
        kernel = 9 * channels * channels
        half = -(-side // 2) if not self.pooled else side // 2
        pixels = half**2 if not self.pooled else half**2 + (-(-half // 2)) ** 2
        return kernel * pixels + 2 * channels

    def lean(self, logit: float) -> None:
        _lean(self.fc, -logit / 2, logit / 2)


class PooledGate(Gate):
    """A gate without convolutions: averages, and a linear layer (SkipNet section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 1)

    def forward(self, x: Tensor, scale: float | None) -> Tensor:
        answer: Tensor = self.fc(x.mean((2, 3)))
        return answer[:, 0]

    def macs(self, side: int) -> int:
        return self.fc.in_features


class RecurrentGates(Gates):
    """SkipNet's RNNGate (Fig. 3c): averages, a projection for each block, one LSTM along the depth, one answer."""

    def __init__(self, channels: list[int], first: int) -> None:
        """`channels`: of each gated block's input, from block `first` on."""
        super().__init__()
        self.first = first
        self.project = nn.ModuleList(nn.Linear(count, _HIDDEN) for count in channels)
        self.lstm = nn.LSTMCell(_HIDDEN, _HIDDEN)
        self.fc = nn.Linear(_HIDDEN, 1)

    def begin(self, images: Tensor, scale: float | None) -> Ask:
        state: tuple[Tensor, Tensor] | None = None

        def ask(number: int, x: Tensor) -> Tensor:
            nonlocal state
            state = self.lstm(self.project[number - self.first](x.mean((2, 3))), state)
            answer: Tensor = self.fc(state[0])
            return answer[:, 0]

        return ask

    def macs(self, backbone: ResidualNet, side: int) -> tuple[int, ...]:
        shared = 4 * 2 * _HIDDEN * _HIDDEN + _HIDDEN
        own = [layer.in_features * _HIDDEN + shared for layer in self.project]  # type: ignore[operator]
        return (*(0 for _ in range(self.first)), *own)  # type: ignore[arg-type]

    def lean(self, logit: float) -> None:
        _lean(self.fc, logit)


class ConditionalGate(Gate):
    """URNet's conditional gating module (Fig. 3): averages and the scale side by side, reduced, to one answer.

    The reduction r is that of SENet: 2C values to C / r, ReLU, to 1; 0.04 % of ResNet-110 with r = 2.
    """

    def __init__(self, channels: int, reduction: int, reading: Reading) -> None:
        super().__init__()
        self.reading = reading
        hidden = max(1, channels // reduction)
        self.reduce = nn.Linear(2 * channels, hidden)
        self.fc = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, scale: float | None) -> Tensor:
        both = self.reading.beside(x.mean((2, 3)), scale, x.shape[1])
        answer: Tensor = self.fc(F.relu(self.reduce(both)))
        return answer[:, 0]

    def macs(self, side: int) -> int:
        return self.reduce.weight.numel() + self.fc.weight.numel()


class PolicyNetwork(Gates):
    """A network of its own that looks at the image and decides all blocks at once."""

    net: ResidualNet
    pool: int
    """The image is averaged over so many pixels a side first: 2 gives ImageNet's 112 x 112."""

    @property
    @abstractmethod
    def answers(self) -> nn.Linear:
        """The layer with one logit per block."""

    @abstractmethod
    def logits(self, images: Tensor, scale: float | None) -> Tensor:
        """Images (B, 3, H, W) to (B, N)."""

    def averaged(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) as the network looks at them."""
        return F.avg_pool2d(images, self.pool) if self.pool > 1 else images

    def begin(self, images: Tensor, scale: float | None) -> Ask:
        logits = self.logits(images, scale)
        return lambda number, x: logits[:, number]

    def macs(self, backbone: ResidualNet, side: int) -> tuple[int, ...]:
        return (cost(self.net, side // self.pool).total, *(0 for _ in range(self.answers.out_features - 1)))

    def lean(self, logit: float) -> None:
        _lean(self.answers, logit)


class Policy(PolicyNetwork):
    """BlockDrop's (section 3.2). With a `reading`, the user's scale is one more feature (URNet's external network)."""

    def __init__(self, spec: ResNet, blocks: int, *, pool: int = 1, reading: Reading | None = None) -> None:
        super().__init__()
        self.pool, self.reading = pool, reading
        self.net = spec.build(1)
        self.net.fc = nn.Linear(self.net.features + (reading is not None), blocks)

    @property
    def answers(self) -> nn.Linear:
        return self.net.fc

    def logits(self, images: Tensor, scale: float | None) -> Tensor:
        x = self.net.walk(self.net.stem(self.averaged(images)), range(self.net.spec.number_of_blocks), None, None)
        features = self.net.embed(x)
        if self.reading is not None:
            features = self.reading.beside(features, scale, 1)
        answer: Tensor = self.net.fc(features)
        return answer


class ClassPolicy(PolicyNetwork):
    """One that tells the classes, and a layer that says for each class which blocks to run.

    An image's logits are the mean of the classes' own, by their probabilities. Where the likeliest class is wrong with
    a chance of more than `doubt`, all blocks run.
    """

    GAIN = 10.0
    """Factor on what the layer says. Adam moves all weights by about the learning rate a step, however small it is for
    the sake of trained features beside it; decisions have units to go, and features hundredths. (SGD moves them a
    hundred times as far as without it.)"""

    def __init__(self, spec: ResNet, blocks: int, classes: int, *, pool: int = 1, doubt: float = 1.0) -> None:
        super().__init__()
        self.pool, self.doubt = pool, doubt
        self.net = spec.build(classes)
        self.fc = nn.Linear(classes, blocks)
        with torch.no_grad():
            self.fc.weight.div_(self.GAIN)
            self.fc.bias.div_(self.GAIN)

    @property
    def answers(self) -> nn.Linear:
        return self.fc

    def lean(self, logit: float) -> None:
        super().lean(logit / self.GAIN)

    def classes(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K)."""
        answer: Tensor = self.net(self.averaged(images))
        return answer

    def logits(self, images: Tensor, scale: float | None) -> Tensor:
        likely = self.classes(images).softmax(1)
        unsure = 1 - likely.amax(1, keepdim=True) > self.doubt
        return torch.where(unsure, _OPEN, self.GAIN * self.fc(likely))

    def macs(self, backbone: ResidualNet, side: int) -> tuple[int, ...]:
        first, *others = super().macs(backbone, side)
        return (first + self.fc.weight.numel(), *others)


def make_gates(kind: GateKind, backbone: ResidualNet, first: int) -> Gates:
    """SkipNet's gates, for all blocks from `first` on."""
    channels = [block.inputs for block in backbone.blocks()][first:]
    if kind == "rnn":
        return RecurrentGates(channels, first)
    if kind == "pooled":
        return GatePerBlock([PooledGate(count) for count in channels], first)
    return GatePerBlock([ConvGate(count, pooled=kind == "ff1") for count in channels], first)


def open_at_start(gates: Gates, rate: float) -> None:
    """Gates that know nothing yet are open at this rate, in (0, 1)."""
    gates.lean(math.log(rate / (1 - rate)))


@torch.no_grad()
def _lean(layer: nn.Linear, *answers: float) -> None:
    """Its answers are about these until something is learned; one value stands for all."""
    layer.weight.mul_(0.1)
    layer.bias.copy_(torch.tensor(answers))
