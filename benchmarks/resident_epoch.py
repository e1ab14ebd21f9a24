"""An epoch of CIFAR-shaped images from memory: padded crop, mirroring, normalisation, no network.

    python benchmarks/resident_epoch.py

Fifty thousand random images of 32 x 32 pixels go through `Feed.training` as in a run, background thread
included. Beside it, alternately in the same process, the plain way: a loop that crops, mirrors and normalises
image by image. Both in one thread of computation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch

from pliant.data import Dataset, Feed
from pliant.data.device import CIFAR10
from pliant.data.index import Pixels
from pliant.data.sources.cifar10 import CLASSES
from pliant.experiment import Batching, Data

IMAGES = 50_000
LOOPED = 5_000  # images of the plain loop in each round: enough to time it


def random_dataset() -> Dataset:
    """Images and labels as many and as large as CIFAR-10's training set."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, len(CLASSES), IMAGES).astype(np.int32)
    return Dataset(Pixels(images, labels, CLASSES), None, None, CLASSES, len(CLASSES))


def epoch_seconds(feed: Feed, epoch: int) -> float:
    """Seconds of one epoch, scaled to all images where the last, incomplete batch is dropped."""
    steps = feed.steps_per_epoch
    started = time.perf_counter()
    with feed.training(stage=0, first_step=epoch * steps, last_step=(epoch + 1) * steps, micro_batches=[0]) as batches:
        served = sum(len(batch.labels) for batch in batches)
    return (time.perf_counter() - started) * IMAGES / served


def loop_seconds(images: np.ndarray, batch: int) -> float:
    """Seconds that the plain loop would take for all images."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CIFAR10.mean, CIFAR10.std))
    padded = np.pad(images[:LOOPED], ((0, 0), (4, 4), (4, 4), (0, 0)))
    generator = np.random.default_rng(0)
    started = time.perf_counter()
    for first in range(0, LOOPED, batch):
        cropped = []
        for image in padded[first : first + batch]:
            top, left = generator.integers(0, 9, 2)
            crop = image[top : top + 32, left : left + 32]
            crop = crop[:, ::-1] if generator.random() < 0.5 else crop
            value = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1).float() / 255
            cropped.append((value - mean) / std)
        torch.stack(cropped).contiguous(memory_format=torch.channels_last)
    return (time.perf_counter() - started) * IMAGES / LOOPED


def main() -> None:
    """Measure, print for a person, end with one line of JSON."""
    parser = argparse.ArgumentParser(description="An epoch of CIFAR-shaped images from memory, without a network.")
    parser.add_argument("--rounds", type=int, default=5, help="epochs measured, after one to warm up")
    parser.add_argument("--batch", type=int, default=128, help="images of a micro-batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset = random_dataset()
    batching = Batching(images=options.batch, micro=options.batch)
    feed = Feed(dataset, Data(source="cifar10"), batching, seed=0, device="cpu")
    epoch_seconds(feed, 0)
    fed, looped = [], []
    for round_number in range(options.rounds):
        fed.append(epoch_seconds(feed, round_number + 1))
        looped.append(loop_seconds(dataset.train.images, options.batch))
        print(f"round {round_number + 1}: epoch {fed[-1]:.3f} s, plain loop {looped[-1]:.2f} s")
    seconds, plain = statistics.median(fed), statistics.median(looped)
    speed = f"{IMAGES / seconds:,.0f} images/s, an epoch in {seconds:.3f} s"
    print(f"{speed}: {plain / seconds:.1f} times as fast as the plain loop")
    figures = dict(benchmark="resident_epoch", images=IMAGES, batch=options.batch, images_per_s=IMAGES / seconds)
    print(json.dumps(figures | dict(seconds=seconds, plain_loop_seconds=plain, ratio=plain / seconds)))


if __name__ == "__main__":
    main()
