"""A network with two exits: images that are easy leave half-way, the others run to the end.

    pliant train docs/example_recipe.py --data.root data/cifar10

Both exits train together, one pass each. How sure of its answer the first exit must be is --recipe.confidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from pliant import cli
from pliant.errors import UserError
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.randomness import Draw
from pliant.recipe import Batch, Native, Outcome, Pass, Point, Progress, Recipe


def layer(inputs: int, outputs: int, stride: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class TwoExitNet(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.front = nn.Sequential(layer(3, channels, 1), layer(channels, 2 * channels, 2))
        self.back = nn.Sequential(layer(2 * channels, 4 * channels, 2), layer(4 * channels, 4 * channels, 1))
        self.early = nn.Linear(2 * channels, classes)
        self.late = nn.Linear(4 * channels, classes)

    def forward(self, images: Tensor, exit: str) -> Tensor:
        """Images (B, 3, H, W) to logits (B, K) at one exit."""
        x = self.front(images)
        return self.early(x.mean((2, 3))) if exit == "early" else self.late(self.back(x).mean((2, 3)))


@dataclass(frozen=True, kw_only=True)
class TwoExits(Recipe):
    channels: int = 16
    """Channels of the first layer."""
    confidence: float = 0.9
    """An image leaves early if its likeliest class has at least this probability there."""
    early_weight: float = 0.5
    """Factor on the early exit's loss."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.confidence <= 1.0:
            raise UserError(f"A probability lies in [0, 1]: write --recipe.confidence so, not {self.confidence:g}.")

    def build(self, classes: int) -> nn.Module:
        return TwoExitNet(classes, self.channels)

    def passes(self, progress: Progress) -> int:
        return 2

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        for name, weight in (("late", 1.0), ("early", self.early_weight)):
            logits = net(batch.images, exit=name)
            right = (logits.argmax(1) == batch.labels).float().mean()
            yield Pass(name, weight * cross_entropy(logits, batch.labels), {"top1": right})

    def points(self) -> tuple[Point, ...]:
        return (Native(),)

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        assert isinstance(net, TwoExitNet)
        features = net.front(images)
        logits = net.early(features.mean((2, 3)))
        stays = logits.float().softmax(1).amax(1) < self.confidence
        if stays.any():
            logits[stays] = net.late(net.back(features[stays]).mean((2, 3)))
        cost, extra = macs(net.front, images), macs(net.back, features)
        return Outcome(logits, macs=cost + extra * stays)


def macs(part: nn.Module, inputs: Tensor) -> float:
    """Multiply-accumulates of one image, as torch counts them; the two linear layers are too small to matter."""
    with FlopCounterMode(display=False) as counter:
        part(inputs[:1])
    return counter.get_total_flops() / 2


EXPERIMENT = Experiment(
    name="two_exits",
    recipe=TwoExits(),
    data=Data(source="cifar10"),
    batch=Batching(images=128, micro=64),
    optimization=Optimization(lr=0.1, epochs=10, warmup_epochs=0.5),
)

if __name__ == "__main__":
    cli.run(EXPERIMENT, __file__)
