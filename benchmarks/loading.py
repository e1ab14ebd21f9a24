"""How fast photographs become training batches: our DALI loader beside what one would write without it.

    python benchmarks/loading.py --root ROOT

ROOT holds train/CLASS/FILE or CLASS/FILE. All sides cut random resized crops of 224 px, mirror and normalise them to
float32, on two threads or worker processes, and take turns in one process:

- pliant: the loader of a run, plan and all;
- dali_native: DALI's own reader, random crop, resize and normalisation;
- torchvision: its DataLoader in its faster form, workers handing over uint8;
- decode_only: libjpeg-turbo decodes every image whole, and that is all.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import tyro
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pliant.data import Feed, open_dataset
from pliant.data.device import IMAGENET
from pliant.errors import UserError
from pliant.experiment import Batching, Data
from pliant.torchvision_cpu import make_importable

make_importable()

from torchvision.transforms import v2

SIZE = 224
PIXELS_MEAN = [255 * value for value in IMAGENET.mean]
PIXELS_STD = [255 * value for value in IMAGENET.std]
Side = Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    root: Path = Path("sample")
    """Photographs in class folders; default: the generated sample, whose small images say little of photographs."""
    samples: int = 6000
    """Images of a turn; the photographs come again and again."""
    batch: int = 64
    workers: int = 2
    """Threads, or processes, of each side."""
    rounds: int = 3
    """Turns of each side; the median counts."""


def pliant(settings: Settings, data: Data) -> Side:
    """The batches of a run's feed."""
    batching = Batching(images=settings.batch, micro=settings.batch)
    feed = Feed(open_dataset(data, 0), data, batching, seed=0, device="cpu")
    turns = itertools.count()

    def batches() -> Iterator[Tensor]:
        steps = settings.samples // settings.batch
        with feed.training(stage=next(turns), first_step=0, last_step=steps, micro_batches=[0]) as served:
            for batch in served:
                yield batch.images

    return batches


def dali_native(settings: Settings, files: list[str], labels: list[int]) -> Side:
    """What DALI's documentation shows for ImageNet, on CPUs."""

    @pipeline_def(batch_size=settings.batch, num_threads=settings.workers, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        encoded, numbers = fn.readers.file(files=files, labels=labels, random_shuffle=True, seed=1, name="reader")
        images = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        mirror = fn.random.coin_flip(probability=0.5)
        pixels = fn.crop_mirror_normalize(
            images, mirror=mirror, mean=PIXELS_MEAN, std=PIXELS_STD, dtype=types.FLOAT, output_layout="CHW"
        )
        return pixels, numbers

    built = pipeline()
    built.build()

    def batches() -> Iterator[Tensor]:
        for _ in range(settings.samples // settings.batch):
            images, _ = built.run()
            yield torch.from_dlpack(images.as_tensor())

    return batches


class Photographs(Dataset[Tensor]):
    """Crops as uint8, so that workers hand over a quarter of the bytes."""

    def __init__(self, files: list[str], samples: int) -> None:
        self._files = files
        self._samples = samples
        self._transform = v2.Compose(
            [v2.RandomResizedCrop(SIZE, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
        )

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self._files[index % len(self._files)]) as image:
            pixels: Tensor = self._transform(image.convert("RGB"))
        return pixels


def torchvision(settings: Settings, files: list[str]) -> Side:
    """PIL decodes and resizes in worker processes; the batch is normalised here."""
    scale = torch.tensor([1 / value for value in PIXELS_STD])[:, None, None]
    shift = torch.tensor([-m / s for m, s in zip(IMAGENET.mean, IMAGENET.std, strict=True)])[:, None, None]

    def batches() -> Iterator[Tensor]:
        loader = DataLoader(
            Photographs(files, settings.samples),
            batch_size=settings.batch,
            shuffle=True,
            num_workers=settings.workers,
            drop_last=True,
        )
        for images in loader:
            yield images.float().mul_(scale).add_(shift)

    return batches


def decode_only(settings: Settings, files: list[str]) -> Side:
    """Every image whole, and dropped."""

    def decode(path: str) -> None:
        content = Path(path).read_bytes()
        if simplejpeg.is_jpeg(content):
            simplejpeg.decode_jpeg(content)
        else:
            Image.open(io.BytesIO(content)).convert("RGB")

    def batches() -> Iterator[Tensor]:
        with ThreadPoolExecutor(settings.workers) as threads:
            paths = itertools.islice(itertools.cycle(files), settings.samples)
            for number, _ in enumerate(threads.map(decode, paths)):
                if number % settings.batch == settings.batch - 1:
                    yield torch.empty(0)

    return batches


def speed(side: Side, settings: Settings) -> tuple[float, float]:
    """Images per second of one turn, and CPU milliseconds per image of this process and its children."""
    started, before = time.perf_counter(), sum(os.times()[:4])
    for _ in side():
        pass
    images = settings.samples // settings.batch * settings.batch
    return images / (time.perf_counter() - started), 1000 * (sum(os.times()[:4]) - before) / images


def main(settings: Settings) -> None:
    torch.set_num_threads(settings.workers)
    data = Data(root=settings.root, loader="dali", threads=settings.workers, prefetch=2)
    train = open_dataset(data, 0).train
    files = [train.path(position) for position in range(len(train))]  # type: ignore[union-attr]
    labels = np.asarray(train.labels).tolist()
    sides = {
        "pliant": pliant(settings, data),
        "dali_native": dali_native(settings, files, labels),
        "torchvision": torchvision(settings, files),
        "decode_only": decode_only(settings, files),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(settings.rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            found[name].append(speed(sides[name], settings))
            images, cpu = found[name][-1]
            print(f"{name}: {images:.0f} images/s, {cpu:.2f} ms of CPU an image", flush=True)

    def versus(other: str, column: int) -> float:
        ratios = [mine[column] / theirs[column] for mine, theirs in zip(found["pliant"], found[other], strict=True)]
        return round(statistics.median(ratios), 3)

    result: dict[str, Any] = {"benchmark": "loading", "images": len(files), "samples": settings.samples}
    for name, turns in found.items():
        result[f"{name}_images_per_s"] = round(statistics.median(images for images, _ in turns), 1)
        result[f"{name}_cpu_ms"] = round(statistics.median(cpu for _, cpu in turns), 3)
    for other in ("dali_native", "torchvision", "decode_only"):
        result[f"vs_{other}"] = versus(other, 0)
        result[f"vs_{other}_cpu"] = round(1 / versus(other, 1), 3)
    print(json.dumps(result | {"workers": settings.workers}))


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
