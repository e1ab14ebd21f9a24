"""MobileNetV2 at any width (Sandler et al. 2018), with torchvision's parameter names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from pliant.networks.mobilenet.base import ConvNorm, Form, NormMaker, SlimmableNet, WidthLike
from pliant.networks.ordinary import Residual, conv_norm_activation
from pliant.networks.slimmable import SlimmableConv2d, SlimmableLinear, active_channels

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""(expansion, channels, blocks, stride) of each group of blocks (Table 2)."""


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


class MobileNetV2(SlimmableNet):
    """Inverted residuals. Groups: the stem, each group of blocks' output, each block's expansion."""

    def __init__(self, spec: Form, classes: int, *, tracked: tuple[float, ...], widest: float, private: bool):
        self.strides = self._strides(spec)
        stages = range(1, len(STAGES) + 1)
        blocks = sum(blocks for expansion, _, blocks, _ in STAGES if expansion > 1)
        self.groups = ("stem", *(f"stage{n}" for n in stages), *(f"expansion{n}" for n in range(1, blocks + 1)))
        super().__init__(spec, classes, tracked, widest, private)
        self.head = 1280 if spec.full >= 1.0 else active_channels(1280, spec.full, 8)
        self._build(NormMaker(private))
        self._initialise()

    @staticmethod
    def _strides(spec: Form) -> tuple[int, ...]:
        strides = [stride for *_, stride in STAGES]
        strides[1], strides[2], strides[5] = spec.early_stride, spec.middle_stride, spec.late_stride
        return tuple(strides)

    def channels(self, width: WidthLike) -> tuple[int, ...]:
        stem, *rest = self._ratios(width)
        stages, expansions = rest[: len(STAGES)], iter(rest[len(STAGES) :])
        outputs = [self._count(32, stem)]
        outputs += [self._count(channels, ratio) for (_, channels, _, _), ratio in zip(STAGES, stages, strict=True)]
        hidden, before = [], 32
        for expansion, channels, blocks, _ in STAGES:
            for _ in range(blocks if expansion > 1 else 0):
                # The un-expanded count is rounded, so that a uniform width's expansion is 6 times its input.
                hidden.append(expansion * self._count(before, next(expansions)))
                before = channels
            before = channels
        return (*outputs, *hidden)

    def _layout(self, channels: tuple[int, ...]) -> list[tuple[int, int, int, int, bool]]:
        """(inputs, hidden, outputs, stride, residual) of each block at these channels."""
        hidden = iter(channels[1 + len(STAGES) :])
        layout, inputs = [], channels[0]
        for stage, (expansion, _, blocks, _) in enumerate(STAGES):
            outputs = channels[1 + stage]
            for block in range(blocks):
                stride = self.strides[stage] if block == 0 else 1
                middle = inputs if expansion == 1 else next(hidden)
                layout.append((inputs, middle, outputs, stride, block > 0))
                inputs = outputs
        return layout

    def _build(self, norm: NormMaker) -> None:
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
        last = SlimmableConv2d(full[len(STAGES)], self.head, 1, average=average)
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
        features.append(conv_norm_activation(channels[len(STAGES)], self.head, 1))
        classifier = nn.Sequential(nn.Dropout(self.spec.dropout), nn.Linear(self.head, self.classes))
        return nn.Sequential(
            OrderedDict(
                features=nn.Sequential(*features),
                pool=nn.AdaptiveAvgPool2d(1),
                flat=nn.Flatten(),
                classifier=classifier,
            )
        )
