"""MobileNetV1 and MobileNetV2 at any width, uniform or group by group (Howard et al. 2017; Sandler et al. 2018).

At width 1 they are the reference networks; MobileNetV2 has torchvision's parameter names. A width is a fraction for
all layers, or one for each of `groups`: layers that a residual addition or a depthwise convolution ties together.

Shapes: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.networks.ordinary import Residual, conv_norm_activation
from pliant.networks.sharing import Shared
from pliant.networks.slimmable import SlimmableBatchNorm2d, SlimmableConv2d, SlimmableLinear, active_channels

WidthLike = float | Sequence[float]

V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""(channels, stride) of each depthwise-separable block of MobileNetV1."""
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, stride) of each group of blocks of MobileNetV2 (its Table 2)."""


@dataclass(frozen=True, kw_only=True)
class MobileNet:
    """Which MobileNet: a value from which `build` makes the network."""

    version: Literal["v1", "v2"] = "v2"
    full: float = 1.0
    """Factor on the published channel counts, which gives the counts at width 1: below 1 for small data."""
    stem_stride: int = 2
    """2 for 224 px; 1 is the form for CIFAR's 32 px."""
    early_stride: int = 2
    """Stride of the first group of blocks that has one: 2 for 224 px, 1 for small images."""
    middle_stride: int = 2
    """Stride of the second one: 2 for 224 px, 1 for small images."""
    late_stride: int = 2
    """Stride of the last one: 2 for 224 px, 1 for small images."""
    divisor: int = 8
    """Channel counts are multiples of it (US-Nets section 5.2)."""
    dropout: float = 0.0
    """Before the classifier; the authors of US-Nets use none."""
    average: bool = False
    """Average outputs by the number of input channels (US-Nets section 6)."""

    @property
    def number_of_groups(self) -> int:
        """Groups of layers whose widths may differ."""
        if self.version == "v1":
            return 1 + len(V1_BLOCKS)
        return 1 + len(V2_STAGES) + sum(blocks for expansion, _, blocks, _ in V2_STAGES if expansion > 1)

    def check(self) -> None:
        """Allocates nothing.

        Raises:
            ValueError: a setting makes no network, or the divisor leaves a layer without channels.
        """
        if not 0.0 < self.full <= 1.0:
            raise ValueError(f"full lies above 0 and is at most 1, not {self.full:g}: write for instance 0.5.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout lies in [0, 1), not {self.dropout:g}: write for instance 0.2.")
        for stride in (self.stem_stride, self.early_stride, self.middle_stride, self.late_stride):
            if stride not in (1, 2):
                raise ValueError(f"Strides are 1 or 2, not {stride}: write one of these.")
        narrowest = 16 if self.version == "v2" else 32  # published channels of the narrowest layer
        active_channels(active_channels(narrowest, self.full, 8), 1.0, self.divisor)

    def build(
        self, classes: int, *, tracked: Sequence[float], widest: float = 1.0, private: bool = False
    ) -> SlimmableNet:
        """The network, initialised as the authors do.

        Args:
            classes: number of outputs K.
            tracked: widths that keep running statistics of their own.
            widest: the largest width that can be run; wider channels are not allocated.
            private: scale and shift of batch norm private to each tracked width.

        Raises:
            ValueError: the divisor leaves a layer without channels.
        """
        kind = MobileNetV1 if self.version == "v1" else MobileNetV2
        return kind(self, classes, tracked=tuple(tracked), widest=widest, private=private)


def relu6(x: Tensor) -> Tensor:
    """In place: batch norm keeps its input for the backward, not this."""
    return F.relu6(x, inplace=True)


class _Norm:
    """Makes batch norms whose sets fit the channels that a layer has at each tracked width."""

    def __init__(self, private: bool) -> None:
        self.private = private

    def __call__(self, channels: int, sets: Sequence[int]) -> SlimmableBatchNorm2d:
        return SlimmableBatchNorm2d(channels, sets, private=self.private)


class ConvNorm(nn.Sequential):
    """Convolution, batch norm and ReLU6, under torchvision's names 0 and 1."""

    def forward(self, x: Tensor, outputs: int | None, index: int | None) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) to (B, outputs, H', W')."""
        return relu6(self[1](self[0](x, outputs), index))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project; under torchvision's names."""

    def __init__(self, layers: Sequence[nn.Module], residual: bool) -> None:
        super().__init__()
        self.conv = nn.ModuleList(layers)
        self.residual = residual

    def forward(self, x: Tensor, hidden: int, outputs: int, index: int | None) -> Tensor:
        """(B, C, H, W) to (B, outputs, H', W'), through `hidden` channels."""
        y = x
        for layer in self.conv[:-2]:
            y = layer(y, hidden, index)
        return self.project(y, outputs, index, x if self.residual else None)

    def project(self, y: Tensor, outputs: int, index: int | None, shortcut: Tensor | None = None) -> Tensor:
        """The block's last two layers, and the addition."""
        y = self.conv[-1](self.conv[-2](y, outputs), index)
        return y if shortcut is None else shortcut + y


class Separable(nn.Sequential):
    """MobileNetV1's block: depthwise, pointwise."""

    def forward(self, x: Tensor, outputs: int, index: int | None) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) to (B, outputs, H', W')."""
        answer: Tensor = self[1](self[0](x, None, index), outputs, index)
        return answer


class SlimmableNet(nn.Module):
    """A network that runs at any width up to `widest`."""

    groups: tuple[str, ...]
    """Names of the layers, or tied layers, whose widths may differ."""
    features: nn.ModuleList
    classifier: nn.ModuleList
    classes: int

    def __init__(self, spec: MobileNet, classes: int, tracked: tuple[float, ...], widest: float, private: bool) -> None:
        super().__init__()
        self.classes = classes
        self.spec, self.tracked, self.widest, self.private = spec, tracked, widest, private
        self.sets = {self.channels(width): index for index, width in reversed(list(enumerate(tracked)))}

    @abstractmethod
    def channels(self, width: WidthLike) -> tuple[int, ...]:
        """Active channels of each group of layers: the key by which widths are one and the same network.

        Raises:
            ValueError: another number of ratios than `groups`, or one above `widest`.
        """

    @abstractmethod
    def prefix(self, images: Tensor, width: WidthLike, index: int | None = None) -> Tensor:
        """What all widths compute alike, at this width: of a narrower one it is the first channels."""

    @abstractmethod
    def rest(self, x: Tensor, width: WidthLike) -> Tensor:
        """Logits (B, K) from `prefix`, of this width or wider."""

    @abstractmethod
    def skeleton(self, width: WidthLike) -> nn.Module:
        """The ordinary network of this shape, uninitialised, with the same names."""

    def forward(self, images: Tensor, width: WidthLike = 1.0) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K) at one width."""
        return self.rest(self.prefix(images, width, self.index(width)), width)

    def at_each(self, images: Tensor, widths: Sequence[WidthLike]) -> Iterator[Tensor]:
        """Logits at each of the widths in turn, the layers that they share exactly computed once.

        Run the backward of each answer before taking the next: the shared layers receive their gradient, the sum
        over all widths, with the last one's. With private scale and shift nothing is shared; nor is it where the
        network is compiled, each width as a whole.
        """
        if self.private or self._compiled_call_impl is not None or not torch.is_grad_enabled():
            for width in widths:
                yield self(images, width)
            return
        widest = max(widths, key=lambda width: self.channels(width)[0])
        shared = Shared(self.prefix(images, widest))
        for number, width in enumerate(widths, start=1):
            first = self.channels(width)[0]
            yield self.rest(shared.settle(first) if number == len(widths) else shared.borrow(first), width)

    def classify(self, x: Tensor) -> Tensor:
        """Features (B, C, H, W) to logits (B, K)."""
        answer: Tensor = self.classifier[1](self.classifier[0](F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return answer

    def index(self, width: WidthLike) -> int | None:
        """The set of running statistics of this width, if it is tracked."""
        return self.sets.get(self.channels(width))

    def _ratios(self, width: WidthLike) -> tuple[float, ...]:
        ratios = (float(width),) * len(self.groups) if isinstance(width, (int, float)) else tuple(width)
        if len(ratios) != len(self.groups):
            raise ValueError(f"This network has {len(self.groups)} groups of layers, and {len(ratios)} widths came.")
        if max(ratios) > self.widest:
            raise ValueError(f"This network was built up to width {self.widest:g}, and {max(ratios):g} came.")
        return ratios

    def _count(self, published: int, ratio: float) -> int:
        return active_channels(active_channels(published, self.spec.full, 8), ratio, self.spec.divisor)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0.0, 0.01)
                nn.init.zeros_(module.bias)


class MobileNetV2(SlimmableNet):
    """Inverted residuals. Groups: the stem, each group of blocks' output, each block's expansion."""

    def __init__(self, spec: MobileNet, classes: int, *, tracked: tuple[float, ...], widest: float, private: bool):
        self.strides = self._strides(spec)
        stages = range(1, len(V2_STAGES) + 1)
        blocks = sum(blocks for expansion, _, blocks, _ in V2_STAGES if expansion > 1)
        self.groups = ("stem", *(f"stage{n}" for n in stages), *(f"expansion{n}" for n in range(1, blocks + 1)))
        super().__init__(spec, classes, tracked, widest, private)
        self.head = 1280 if spec.full >= 1.0 else active_channels(1280, spec.full, 8)
        self._build(_Norm(private))
        self._initialise()

    @staticmethod
    def _strides(spec: MobileNet) -> tuple[int, ...]:
        strides = [stride for *_, stride in V2_STAGES]
        strides[1], strides[2], strides[5] = spec.early_stride, spec.middle_stride, spec.late_stride
        return tuple(strides)

    def channels(self, width: WidthLike) -> tuple[int, ...]:
        stem, *rest = self._ratios(width)
        stages, expansions = rest[: len(V2_STAGES)], iter(rest[len(V2_STAGES) :])
        outputs = [self._count(32, stem)]
        outputs += [self._count(channels, ratio) for (_, channels, _, _), ratio in zip(V2_STAGES, stages, strict=True)]
        hidden, before = [], 32
        for expansion, channels, blocks, _ in V2_STAGES:
            for _ in range(blocks if expansion > 1 else 0):
                # The un-expanded count is rounded, so that a uniform width's expansion is 6 times its input.
                hidden.append(expansion * self._count(before, next(expansions)))
                before = channels
            before = channels
        return (*outputs, *hidden)

    def _layout(self, channels: tuple[int, ...]) -> list[tuple[int, int, int, int, bool]]:
        """(inputs, hidden, outputs, stride, residual) of each block at these channels."""
        hidden = iter(channels[1 + len(V2_STAGES) :])
        layout, inputs = [], channels[0]
        for stage, (expansion, _, blocks, _) in enumerate(V2_STAGES):
            outputs = channels[1 + stage]
            for block in range(blocks):
                stride = self.strides[stage] if block == 0 else 1
                middle = inputs if expansion == 1 else next(hidden)
                layout.append((inputs, middle, outputs, stride, block > 0))
                inputs = outputs
        return layout

    def _build(self, norm: _Norm) -> None:
        average = self.spec.average
        full = self.channels(self.widest)
        tracked = [self._layout(channels) for channels in (self.channels(width) for width in self.tracked)]
        prefix_sets = [layout[0][0] for layout in tracked] if self.private else [full[0]]
        stem = SlimmableConv2d(3, full[0], 3, stride=self.spec.stem_stride)
        features: list[nn.Module] = [ConvNorm(stem, norm(full[0], prefix_sets))]
        for number, (inputs, hidden, outputs, stride, residual) in enumerate(self._layout(full)):
            hidden_sets = [layout[number][1] for layout in tracked] if number else prefix_sets
            layers: list[nn.Module] = []
            if number:
                expand = SlimmableConv2d(inputs, hidden, 1, average=average)
                layers.append(ConvNorm(expand, norm(hidden, hidden_sets)))
            depthwise = SlimmableConv2d(hidden, hidden, 3, stride=stride, groups=hidden)
            layers.append(ConvNorm(depthwise, norm(hidden, hidden_sets)))
            layers.append(SlimmableConv2d(hidden, outputs, 1, average=average))
            layers.append(norm(outputs, [layout[number][2] for layout in tracked]))
            features.append(InvertedResidual(layers, residual))
        last = SlimmableConv2d(full[len(V2_STAGES)], self.head, 1, average=average)
        features.append(ConvNorm(last, norm(self.head, [self.head] * len(self.tracked))))
        self.features = nn.ModuleList(features)
        self.classifier = nn.ModuleList([nn.Dropout(self.spec.dropout), SlimmableLinear(self.head, self.classes)])

    def prefix(self, images: Tensor, width: WidthLike, index: int | None = None) -> Tensor:
        """Stem and first depthwise convolution: (B, 3, H, W) to (B, C, H', W')."""
        index = index if self.private else 0
        x = self.features[0](images, self.channels(width)[0], index)
        answer: Tensor = cast(InvertedResidual, self.features[1]).conv[0](x, None, index)
        return answer

    def rest(self, x: Tensor, width: WidthLike) -> Tensor:
        channels = self.channels(width)
        index = self.sets.get(channels)
        layout = self._layout(channels)
        x = cast(InvertedResidual, self.features[1]).project(x[:, : channels[0]], layout[0][2], index)
        for block, (_, hidden, outputs, _, _) in zip(self.features[2:-1], layout[1:], strict=True):
            x = block(x, hidden, outputs, index)
        return self.classify(self.features[-1](x, self.head, index))

    def skeleton(self, width: WidthLike) -> nn.Module:
        channels = self.channels(width)
        features: list[nn.Module] = [conv_norm_activation(3, channels[0], 3, self.spec.stem_stride)]
        for number, (inputs, hidden, outputs, stride, residual) in enumerate(self._layout(channels)):
            layers: list[nn.Module] = [conv_norm_activation(inputs, hidden, 1)] if number else []
            layers.append(conv_norm_activation(hidden, hidden, 3, stride, groups=hidden))
            layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
            features.append(Residual(nn.Sequential(*layers), residual))
        features.append(conv_norm_activation(channels[len(V2_STAGES)], self.head, 1))
        classifier = nn.Sequential(nn.Dropout(self.spec.dropout), nn.Linear(self.head, self.classes))
        return nn.Sequential(
            OrderedDict(
                features=nn.Sequential(*features),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                classifier=classifier,
            )
        )


class MobileNetV1(SlimmableNet):
    """Depthwise-separable blocks, with ReLU6 as in TensorFlow's and the US-Nets authors' code.

    Groups: the stem and each block's output; a depthwise layer follows its input.
    """

    def __init__(self, spec: MobileNet, classes: int, *, tracked: tuple[float, ...], widest: float, private: bool):
        self.groups = ("stem", *(f"block{number}" for number in range(1, len(V1_BLOCKS) + 1)))
        super().__init__(spec, classes, tracked, widest, private)
        self._build(_Norm(private))
        self._initialise()

    def _stride(self, number: int) -> int:
        chosen = {1: self.spec.early_stride, 3: self.spec.middle_stride, 11: self.spec.late_stride}
        return chosen.get(number, V1_BLOCKS[number][1])

    def channels(self, width: WidthLike) -> tuple[int, ...]:
        published = (32, *(channels for channels, _ in V1_BLOCKS))
        return tuple(self._count(count, ratio) for count, ratio in zip(published, self._ratios(width), strict=True))

    def _build(self, norm: _Norm) -> None:
        average = self.spec.average
        full = self.channels(self.widest)
        sets = [[self.channels(width)[group] for width in self.tracked] for group in range(len(full))]
        prefix_sets = sets[0] if self.private else [full[0]]
        stem = SlimmableConv2d(3, full[0], 3, stride=self.spec.stem_stride)
        features: list[nn.Module] = [ConvNorm(stem, norm(full[0], prefix_sets))]
        for number in range(len(V1_BLOCKS)):
            inputs, outputs = full[number], full[number + 1]
            depthwise = SlimmableConv2d(inputs, inputs, 3, stride=self._stride(number), groups=inputs)
            pointwise = SlimmableConv2d(inputs, outputs, 1, average=average)
            depthwise_sets = sets[number] if number else prefix_sets
            features.append(
                Separable(
                    ConvNorm(depthwise, norm(inputs, depthwise_sets)),
                    ConvNorm(pointwise, norm(outputs, sets[number + 1])),
                )
            )
        self.features = nn.ModuleList(features)
        classifier = SlimmableLinear(full[-1], self.classes, average=average)
        self.classifier = nn.ModuleList([nn.Dropout(self.spec.dropout), classifier])

    def prefix(self, images: Tensor, width: WidthLike, index: int | None = None) -> Tensor:
        """Stem and first depthwise convolution: (B, 3, H, W) to (B, C, H', W')."""
        index = index if self.private else 0
        x = self.features[0](images, self.channels(width)[0], index)
        answer: Tensor = cast(Separable, self.features[1])[0](x, None, index)
        return answer

    def rest(self, x: Tensor, width: WidthLike) -> Tensor:
        channels = self.channels(width)
        index = self.sets.get(channels)
        x = cast(Separable, self.features[1])[1](x[:, : channels[0]], channels[1], index)
        for block, outputs in zip(self.features[2:], channels[2:], strict=True):
            x = block(x, outputs, index)
        return self.classify(x)

    def skeleton(self, width: WidthLike) -> nn.Module:
        channels = self.channels(width)
        features: list[nn.Module] = [conv_norm_activation(3, channels[0], 3, self.spec.stem_stride)]
        for number, (inputs, outputs) in enumerate(pairwise(channels)):
            depthwise = conv_norm_activation(inputs, inputs, 3, self._stride(number), groups=inputs)
            pointwise = conv_norm_activation(inputs, outputs, 1)
            features.append(nn.Sequential(depthwise, pointwise))
        classifier = nn.Linear(channels[-1], self.classes)
        return nn.Sequential(
            OrderedDict(
                features=nn.Sequential(*features),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                classifier=nn.Sequential(nn.Dropout(self.spec.dropout), classifier),
            )
        )
