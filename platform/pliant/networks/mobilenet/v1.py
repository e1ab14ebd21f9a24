"""MobileNetV1 at any width (Howard et al. 2017)."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from pliant.networks.mobilenet.base import ConvNorm, Form, NormMaker, SlimmableNet, WidthLike
from pliant.networks.ordinary import conv_norm_activation
from pliant.networks.slimmable import SlimmableConv2d, SlimmableLinear

BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))
"""(channels, stride) of each depthwise-separable block."""


class Separable(nn.Sequential):
    """MobileNetV1's block: depthwise, pointwise."""

    def forward(self, x: Tensor, outputs: int, index: int | None) -> Tensor:  # type: ignore[override]
        """(B, C, H, W) to (B, outputs, H', W')."""
        answer: Tensor = self[1](self[0](x, None, index), outputs, index)
        return answer


class MobileNetV1(SlimmableNet):
    """Depthwise-separable blocks, with ReLU6 as in TensorFlow's and the US-Nets authors' code.

    Groups: the stem and each block's output; a depthwise layer follows its input.
    """

    def __init__(self, spec: Form, classes: int, *, tracked: tuple[float, ...], widest: float, private: bool):
        self.groups = ("stem", *(f"block{number}" for number in range(1, len(BLOCKS) + 1)))
        super().__init__(spec, classes, tracked, widest, private)
        self._build(NormMaker(private))
        self._initialise()

    def _stride(self, number: int) -> int:
        chosen = {1: self.spec.early_stride, 3: self.spec.middle_stride, 11: self.spec.late_stride}
        return chosen.get(number, BLOCKS[number][1])

    def channels(self, width: WidthLike) -> tuple[int, ...]:
        published = (32, *(channels for channels, _ in BLOCKS))
        return tuple(self._count(count, ratio) for count, ratio in zip(published, self._ratios(width), strict=True))

    def _build(self, norm: NormMaker) -> None:
        average = self.spec.average
        full = self.channels(self.widest)
        sets = [[self.channels(width)[group] for width in self.tracked] for group in range(len(full))]
        prefix_sets = sets[0] if self.private else [full[0]]
        stem = SlimmableConv2d(3, full[0], 3, stride=self.spec.stem_stride)
        features: list[nn.Module] = [ConvNorm(stem, norm(full[0], prefix_sets))]
        for number in range(len(BLOCKS)):
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
