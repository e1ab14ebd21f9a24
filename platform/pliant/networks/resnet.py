"""Residual networks whose blocks can be left out, image by image (He et al., 2016).

CIFAR's form has depth 6n + 2 and 16, 32, 64 channels; ImageNet's has torchvision's parameter names. Between its blocks
a network knows nothing of methods: whoever calls it hands over `decide`, which says for each block and image how far
the block is open.

Shapes: B images, C channels, H W pixels, K classes, N blocks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Decide = Callable[[int, Tensor], Tensor | None]
"""From a block's number and input (B, C, H, W) to how far it is open, (B,) in [0, 1]; None: it runs for all."""
Run = Callable[["Block", Tensor, Tensor | None], Tensor]
"""One way to carry a decision out: networks/execution.py."""

_IMAGENET = {
    10: ("basic", (1, 1, 1, 1)),
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
}


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """Which residual network: a value from which `build` makes it."""

    form: Literal["cifar", "imagenet"] = "cifar"
    """cifar: a stem of 3 x 3 at stride 1 for 32 px, three groups of blocks. imagenet: torchvision's, four groups."""
    depth: int = 32
    """cifar: 6n + 2, from 8 on. imagenet: 10, 18, 34, 50 or 101."""
    shortcut: Literal["pad", "pool", "conv"] = "pad"
    """How a shortcut changes its shape (cifar). pad: every second pixel, zeros for the new channels on both sides
    (option A). pool: averages over 2 x 2 pixels, zeros behind (BlockDrop's code). conv: a 1 x 1 convolution with batch
    norm (option B, SkipNet's code; ImageNet networks always)."""

    def check(self) -> None:
        """Allocates nothing.

        Raises:
            ValueError: there is no such network.
        """
        if self.form == "cifar" and (self.depth < 8 or self.depth % 6 != 2):
            raise ValueError(f"CIFAR's networks have depth 6n + 2, not {self.depth}: write for instance 32.")
        if self.form == "imagenet" and self.depth not in _IMAGENET:
            raise ValueError(f"There is no ImageNet ResNet-{self.depth} here: write 10, 18, 34, 50 or 101.")

    @property
    def blocks_of_groups(self) -> tuple[int, ...]:
        """Blocks of each group of one resolution."""
        if self.form == "cifar":
            return ((self.depth - 2) // 6,) * 3
        return _IMAGENET[self.depth][1]

    @property
    def number_of_blocks(self) -> int:
        """N."""
        return sum(self.blocks_of_groups)

    def build(self, classes: int) -> ResidualNet:
        """The network, initialised as He et al. do."""
        return ResidualNet(self, classes)


class Block(nn.Module):
    """A residual block: what it adds, what it adds it to, and what is left if it adds nothing."""

    def __init__(self, inputs: int, channels: int, outputs: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.inputs, self.channels, self.outputs, self.stride = inputs, channels, outputs, stride
        self.downsample = shortcut

    @abstractmethod
    def residual(self, x: Tensor) -> Tensor:
        """F(x): (B, C, H, W) to (B, C', H', W')."""

    def shortcut(self, x: Tensor) -> Tensor:
        """What F(x) is added to: the input, in the shape of F(x)."""
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x: Tensor) -> Tensor:
        """ReLU(shortcut + F)."""
        # In place: what batch norm or a convolution made is nobody else's, and no backward needs it.
        return F.relu(self.residual(x).add_(self.shortcut(x)), inplace=True)


class Basic(Block):
    """Two 3 x 3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__(inputs, outputs, outputs, stride, shortcut)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        answer: Tensor = self.bn2(self.conv2(x))
        return answer


class Bottleneck(Block):
    """1 x 1, 3 x 3 with the stride, 1 x 1 to four times the channels: torchvision's form."""

    def __init__(self, inputs: int, channels: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__(inputs, channels, 4 * channels, stride, shortcut)
        self.conv1 = nn.Conv2d(inputs, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        answer: Tensor = self.bn3(self.conv3(x))
        return answer


class Pad(nn.Module):
    """Option A: every second pixel, and as many zero channels before as behind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/2, W/2)."""
        before = self.more // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.more - before))


class Pool(nn.Module):
    """Averages over 2 x 2 pixels, and zero channels behind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.more = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H/2, W/2)."""
        return F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, self.more))


def projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Option B: a 1 x 1 convolution with batch norm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResidualNet(nn.Module):
    """A stem, N blocks, and a linear classifier on the averaged features."""

    def __init__(self, spec: ResNet, classes: int) -> None:
        super().__init__()
        self.spec, self.classes = spec, classes
        cifar = spec.form == "cifar"
        channels = (16, 32, 64) if cifar else (64, 128, 256, 512)
        kernel, stride, padding = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, channels[0], kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.groups = len(channels)
        inputs = channels[0]
        for number, (count, width) in enumerate(zip(spec.blocks_of_groups, channels, strict=True)):
            blocks = []
            for index in range(count):
                blocks.append(_block(spec, inputs, width, 2 if index == 0 and number else 1))
                inputs = blocks[-1].outputs
            setattr(self, f"layer{number + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)
        self._initialise()

    @property
    def features(self) -> int:
        """Values per image that the classifier reads."""
        return self.fc.in_features

    def blocks(self) -> Iterator[Block]:
        """All of them, in order."""
        for number in range(1, self.groups + 1):
            yield from getattr(self, f"layer{number}")

    def stem(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the first block's input."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return x if self.spec.form == "cifar" else F.max_pool2d(x, 3, 2, 1)

    def embed(self, x: Tensor) -> Tensor:
        """The last block's output to features (B, F)."""
        return x.mean((2, 3))

    def forward(self, images: Tensor, decide: Decide | None = None, run: Run | None = None) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K).

        Args:
            decide: how far each block is open for each image; default: all blocks run.
            run: how a decision is carried out; to be given with `decide`.
        """
        x = self.walk(self.stem(images), range(self.spec.number_of_blocks), decide, run)
        answer: Tensor = self.fc(self.embed(x))
        return answer

    def walk(self, x: Tensor, numbers: range, decide: Decide | None, run: Run | None) -> Tensor:
        """Some of the blocks, from the first one's input to the last one's output."""
        for number, block in enumerate(self.blocks()):
            if number in numbers:
                x = block(x) if decide is None or run is None else run(block, x, decide(number, x))
        return x

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _block(spec: ResNet, inputs: int, channels: int, stride: int) -> Block:
    bottleneck = spec.form == "imagenet" and _IMAGENET[spec.depth][0] == "bottleneck"
    outputs = 4 * channels if bottleneck else channels
    shortcut: nn.Module | None = None
    if stride != 1 or inputs != outputs:
        kind = "conv" if spec.form == "imagenet" else spec.shortcut
        simple = Pad if kind == "pad" else Pool
        shortcut = projection(inputs, outputs, stride) if kind == "conv" else simple(inputs, outputs)
    if bottleneck:
        return Bottleneck(inputs, channels, stride, shortcut)
    return Basic(inputs, outputs, stride, shortcut)


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates of one image, convolutions and matrix products; batch norm and additions are not counted."""

    outside: int
    """Stem and classifier."""
    residual: tuple[int, ...]
    """F of each block: what is saved where it is closed."""
    shortcut: tuple[int, ...]
    """The projection of each block, which runs in any case."""

    @property
    def always(self) -> int:
        """What every image costs."""
        return self.outside + sum(self.shortcut)

    @property
    def total(self) -> int:
        """With all blocks open."""
        return self.always + sum(self.residual)


def input_sides(net: ResidualNet, side: int) -> list[int]:
    """Pixels a side of each block's input, for an image of `side` x `side` pixels."""
    now = side if net.spec.form == "cifar" else _strided(_strided(side, 2), 2)
    sides = []
    for block in net.blocks():
        sides.append(now)
        now = _strided(now, block.stride)
    return sides


def cost(net: ResidualNet, side: int) -> Cost:
    """What an image of `side` x `side` pixels costs."""
    stem = _macs(net.conv1, side if net.spec.form == "cifar" else _strided(side, 2))
    residual, shortcut = [], []
    for block, entering in zip(net.blocks(), input_sides(net, side), strict=True):
        leaving = _strided(entering, block.stride)
        convolutions = [module for name, module in block.named_children() if name.startswith("conv")]
        residual.append(
            sum(
                # A stride acts in one convolution: those before it see the larger input.
                _macs(conv, entering if _before_stride(block, conv) else leaving)
                for conv in convolutions
                if isinstance(conv, nn.Conv2d)
            )
        )
        projected = block.downsample[0] if isinstance(block.downsample, nn.Sequential) else None
        shortcut.append(_macs(projected, leaving) if isinstance(projected, nn.Conv2d) else 0)
    return Cost(stem + net.fc.weight.numel(), tuple(residual), tuple(shortcut))


def _before_stride(block: Block, conv: nn.Conv2d) -> bool:
    return isinstance(block, Bottleneck) and conv is block.conv1


def _strided(side: int, stride: int) -> int:
    """What a padded convolution or pooling makes of it: rounded up."""
    return -(-side // stride)


def _macs(conv: nn.Conv2d, side: int) -> int:
    """Of a result of `side` x `side` pixels."""
    return conv.weight.numel() * side * side
