"""MobileNetV1 and MobileNetV2 at any width, uniform or group by group.

At width 1 they are the reference networks. A width is a fraction for all layers, or one for each of `groups`: layers
that a residual addition or a depthwise convolution ties together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pliant.networks.mobilenet import v1, v2
from pliant.networks.mobilenet.base import Form, SlimmableNet, WidthLike
from pliant.networks.mobilenet.v1 import MobileNetV1
from pliant.networks.mobilenet.v2 import MobileNetV2

__all__ = ["MobileNet", "MobileNetV1", "MobileNetV2", "SlimmableNet", "WidthLike"]


@dataclass(frozen=True, kw_only=True)
class MobileNet(Form):
    """Which MobileNet: a value from which `build` makes the network."""

    @property
    def number_of_groups(self) -> int:
        """Groups of layers whose widths may differ."""
        if self.version == "v1":
            return 1 + len(v1.BLOCKS)
        return 1 + len(v2.STAGES) + sum(blocks for expansion, _, blocks, _ in v2.STAGES if expansion > 1)

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
