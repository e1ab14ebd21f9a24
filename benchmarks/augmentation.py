"""What each kind of augmentation costs on images from memory, and a batch at once against torchvision one by one.

    python benchmarks/augmentation.py

Random images of CIFAR-10's size go through `Feed.training` as in a run, background thread included, with one kind of
augmentation at a time; settings take turns within each round. Beside it, in the same process, the plain way for
RandAugment and AutoAugment: torchvision's transforms, image by image. All in one thread of computation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from pliant.data import Dataset, Feed
from pliant.data.index import Pixels
from pliant.data.sources.cifar10 import CLASSES
from pliant.experiment import Batching, Data
from pliant.torchvision_cpu import make_importable

make_importable()
from torchvision.transforms import v2

KINDS: dict[str, Data] = {
    "none": Data(source="cifar10"),
    "randaugment": Data(source="cifar10", augment="randaugment"),
    "autoaugment": Data(source="cifar10", augment="autoaugment"),
    "erasing": Data(source="cifar10", erasing=0.25),
    "erasing, noise": Data(source="cifar10", erasing=0.25, erasing_mode="pixel"),
    "mixup and CutMix": Data(source="cifar10", mixup=0.8, cutmix=1.0),
}
PLAIN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "randaugment": v2.RandAugment(),
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
}
LOOPED = 500  # images of the plain loop in each round: enough to time it


def random_dataset(images: int) -> Dataset:
    """Images of 32 x 32 pixels, and labels."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, len(CLASSES), images).astype(np.int32)
    return Dataset(Pixels(pixels, labels, CLASSES), None, None, CLASSES, len(CLASSES))


def fed_per_s(feed: Feed, round_number: int, steps: int) -> float:
    """Images that a feed serves in a second."""
    first = round_number * steps
    started = time.perf_counter()
    with feed.training(stage=0, first_step=first, last_step=first + steps, micro_batches=[0]) as batches:
        served = sum(len(batch.labels) for batch in batches)
    return served / (time.perf_counter() - started)


def looped_per_s(transform: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> float:
    """Images that a transform changes in a second, one by one: neither crop nor normalisation are in it."""
    started = time.perf_counter()
    for image in images[:LOOPED]:
        transform(image)
    return LOOPED / (time.perf_counter() - started)


def main() -> None:
    """Measure, print for a person, end with one line of JSON."""
    parser = argparse.ArgumentParser(description="What each kind of augmentation costs on images from memory.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds measured, after one to warm up")
    parser.add_argument("--batch", type=int, default=128, help="images of a micro-batch")
    parser.add_argument("--steps", type=int, default=50, help="micro-batches of a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = random_dataset(options.batch * options.steps)
    batching = Batching(images=options.batch, micro=options.batch)
    feeds = {name: Feed(dataset, data, batching, seed=0, device="cpu") for name, data in KINDS.items()}
    images = torch.from_numpy(dataset.train.images).permute(0, 3, 1, 2).contiguous()
    fed: dict[str, list[float]] = {name: [] for name in KINDS}
    looped: dict[str, list[float]] = {name: [] for name in PLAIN}
    for round_number in range(options.rounds + 1):
        for name, feed in feeds.items():
            fed[name].append(fed_per_s(feed, round_number, options.steps))
        for name, transform in PLAIN.items():
            looped[name].append(looped_per_s(transform, images))
    per_s = {name: statistics.median(speeds[1:]) for name, speeds in fed.items()}
    plain_per_s = {name: statistics.median(speeds[1:]) for name, speeds in looped.items()}
    for name, speed in per_s.items():
        beside = f", {speed / plain_per_s[name]:.1f} times as fast as image by image" if name in plain_per_s else ""
        print(f"{name:<16} {speed:>9,.0f} images/s, {1e6 / speed:>5.1f} us an image{beside}")
    ratios = {name: per_s[name] / plain_per_s[name] for name in plain_per_s}
    figures = dict(benchmark="augmentation", batch=options.batch, images_per_s=per_s, ratios=ratios)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
