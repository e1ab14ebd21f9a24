"""How much of BlockDrop is telling the class: decisions looked up by the true label, not by looking at the image.

    python benchmarks/studies/blockdrop_by_class.py --root data/cifar10 --pretrained resnet32.safetensors

One row of decisions for each class, learned by BlockDrop's own policy gradient on a frozen ResNet-32. All images of a
class run the same blocks; what accuracy that gives beyond the network's own is the label's, told by the choice of
blocks. Last line JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import cast

import torch
import tyro
from torch import Tensor, nn

from pliant.data import Feed
from pliant.engine.ranks import Ranks
from pliant.engine.session import make_feed
from pliant.experiment import Batching, Data, Experiment, Optimization
from pliant.methods.blockdrop import BlockDrop
from pliant.methods.reinforce import bounded, log_probability, policy_loss, sample
from pliant.networks.execution import folded, runner
from pliant.networks.gated import threshold
from pliant.networks.resnet import ResidualNet, ResNet

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is learned from what."""

    root: Path
    """CIFAR-10, in its own files."""
    pretrained: Path
    """Weights of the residual network."""
    depth: int = 32
    gamma: float = 0.1
    """Penalty of a wrong answer."""
    alpha: float = 0.9
    """Bound on the sampled probabilities."""
    steps: int = 300
    """Of 256 images."""
    lr: float = 0.1
    seed: int = 0


def answers(net: ResidualNet, images: Tensor, opened: Tensor) -> Tensor:
    """Logits where each image runs its own blocks, opened (B, N)."""
    logits: Tensor = net(images, lambda number, x: opened[:, number], runner("grouped", "inside"))
    return logits


def learn(net: ResidualNet, feed: Feed, recipe: BlockDrop, settings: Settings) -> Tensor:
    """Logits of the decisions, (K, N)."""
    generator = torch.Generator().manual_seed(settings.seed)
    table = nn.Parameter(0.3 * torch.randn(net.classes, net.spec.number_of_blocks, generator=generator))
    optimizer = torch.optim.Adam([table], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    with feed.evaluation("train", batch=256) as batches:
        kept = list(islice(batches, settings.steps))
    for batch in islice(cycle(kept), settings.steps):
        probability = bounded(table[batch.labels].sigmoid(), settings.alpha)
        sampled = sample(probability, generator)
        likeliest = threshold(0, table[batch.labels].detach())
        rewards = [
            recipe.reward(answers(net, batch.images, opened), batch.labels, opened, 0, settings.gamma)
            for opened in (sampled, likeliest)
        ]
        loss = policy_loss(log_probability(probability, sampled), rewards[0] - rewards[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return table.detach()


@torch.inference_mode()
def score(net: ResidualNet, feed: Feed, table: Tensor) -> dict[str, float]:
    """Top-1 and blocks on the test images, by a table of decisions, (K, N)."""
    right = blocks = images = 0.0
    with feed.evaluation("val", batch=256) as batches:
        for batch in batches:
            opened = threshold(0, table[batch.labels])
            right += (answers(net, batch.images, opened).argmax(1) == batch.labels).sum().item()
            blocks += opened.sum().item()
            images += len(batch.labels)
    return {"top1": round(right / images, 4), "blocks": round(blocks / images, 2)}


def main(settings: Settings) -> None:
    recipe = BlockDrop(network=ResNet(depth=settings.depth), pretrained=settings.pretrained)
    experiment = Experiment(
        name="blockdrop_by_class",
        recipe=recipe,
        data=Data(source="cifar10", root=settings.root, statistics="imagenet"),
        batch=Batching(images=256, micro=256),
        optimization=Optimization(steps=settings.steps),
    )
    feed = make_feed(experiment, ALONE)
    backbone = recipe.network.build(feed.dataset.num_classes)
    recipe.start(backbone)
    net = cast(ResidualNet, folded(backbone.eval().requires_grad_(False)).to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    whole = score(net, feed, torch.ones(net.classes, net.spec.number_of_blocks))
    print(f"all blocks: {100 * whole['top1']:.2f} %", flush=True)
    by_class = score(net, feed, learn(net, feed, recipe, settings))
    print(f"by the true class: {100 * by_class['top1']:.2f} % with {by_class['blocks']:.2f} blocks", flush=True)
    print(json.dumps({"benchmark": "blockdrop_by_class", "whole": whole, "by_class": by_class}))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
