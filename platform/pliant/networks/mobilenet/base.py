"""What MobileNets share: their settings, and a network that runs at any width.

Shapes: B images, C channels, H W pixels, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.networks.sharing import Shared
from pliant.networks.slimmable import SlimmableBatchNorm2d, active_channels

WidthLike = float | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Form:
    """Which MobileNet."""

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


def relu6(x: Tensor) -> Tensor:
    """In place: batch norm keeps its input for the backward, not this."""
    return F.relu6(x, inplace=True)


class NormMaker:
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


class SlimmableNet(nn.Module):
    """A network that runs at any width up to `widest`."""

    groups: tuple[str, ...]
    """Names of the layers, or tied layers, whose widths may differ."""
    features: nn.ModuleList
    classifier: nn.ModuleList
    classes: int

    def __init__(self, spec: Form, classes: int, tracked: tuple[float, ...], widest: float, private: bool) -> None:
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
