"""The images of a run, in the order and with the crops that its seed says, whoever asks for which of them.

What is in a micro-batch depends on (seed, stage, step, index in the global batch) alone: ranks share out the
indices, and a run is resumed by naming the step.

Shapes: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.data.dataset import Dataset, SplitName, open_dataset
from pliant.data.device import IMAGENET, OF_SOURCE, Finish
from pliant.data.faults import Faults
from pliant.data.index import Index, Split
from pliant.data.loaders import Loaded, Loader, Request
from pliant.data.loaders.dali import DaliLoader, available
from pliant.data.loaders.resident import ResidentLoader
from pliant.data.loaders.torchvision import TorchvisionLoader
from pliant.data.mixing import mixed_targets, timm_mixup
from pliant.data.operations import functional
from pliant.data.order import Order, steps_per_epoch
from pliant.data.plan import Draws, Plan, centre_plan, mixed_plan, padded_plan, training_plan, whole_plan
from pliant.data.prefetch import Prefetch
from pliant.errors import UserError
from pliant.experiment import Batching
from pliant.images import Data
from pliant.randomness import philox

__all__ = ["Batch", "Dataset", "Feed", "open_dataset"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images ready for a network."""

    images: Tensor
    """float32 (float64 for a feed of that type), normalised, (B, 3, H, W), channels last, on the device."""
    labels: Tensor
    """int64, (B,), on the device: each image's own class."""
    positions: Tensor
    """int64, (B,), on the device: where each image stands in its split."""
    targets: Tensor
    """What a loss learns from: the labels; in training with mixup or CutMix the share of each class in each image, of
    the images' type, (B, classes)."""


class Feed:
    """Serves the batches of a dataset on one device; on a GPU, in its default stream."""

    def __init__(
        self,
        dataset: Dataset,
        data: Data,
        batching: Batching,
        *,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Serve `dataset` as `data` and `batching` say.

        Raises:
            UserError: there are fewer training images than a step takes and the tail is dropped; or
                `data.loader` is not installed.
        """
        self.dataset = dataset
        self.data = data
        self.batching = batching
        self.seed = seed
        self.device = torch.device(device)
        self._dtype = dtype
        images = len(dataset.train)
        if images < batching.images and data.tail == "drop":
            raise UserError(
                f"A step takes {batching.images} images but there are only {images} to train on: "
                f"write --batch.images {images} or less, or --data.tail wrap."
            )
        self.steps_per_epoch = steps_per_epoch(images, batching.images, data.tail)
        """Steps of one pass over the training images, of `batching.images` each."""
        self.loader = _loader_name(dataset.train, data)
        """What decodes: dali, torchvision or resident."""
        self.faults = Faults(data.broken_share)
        """The broken images met so far."""
        self._order = Order(images, seed, data.tail)
        self.normalisation = OF_SOURCE[data.source] if data.statistics == "dataset" else IMAGENET
        """What is taken off the colours, and what they are divided by."""
        self._finish = Finish(self.normalisation, self.device)
        self._loaders: dict[SplitName, Loader] = {}
        self._loader_of("train")  # what is not installed is missed now
        if data.augment != "none":
            functional()  # imported now, not while the first batch is waited for
        if data.mixes:
            timm_mixup()

    def steps_of_epoch(self, times: int) -> int:
        """Steps of one pass over the training images, of `times` times `batching.images` each.

        Raises:
            UserError: there are fewer images than such a step takes, and the tail is dropped.
        """
        images, wanted = len(self.dataset.train), self.batching.times(times).images
        steps = steps_per_epoch(images, wanted, self.data.tail)
        if steps == 0:
            raise UserError(
                f"A step takes {wanted} images in one of the recipe's stages, but there are only {images} to train on: "
                f"write --batch.images {max(1, images // times)} or less, or --data.tail wrap."
            )
        return steps

    def training(
        self, *, stage: int, first_step: int, last_step: int, micro_batches: Sequence[int], times: int = 1
    ) -> AbstractContextManager[Iterator[Batch]]:
        """The micro-batches of the steps `first_step` up to but not including `last_step`, augmented.

        Args:
            stage: index of the stage.
            first_step: the first step, counted within the stage.
            last_step: the step after the last.
            micro_batches: this rank's indices in the global batch, in the order in which it takes them.
            times: images of a step, as a multiple of `batching.images`.

        Returns:
            To be entered with `with`: an iterator over the given micro-batches of the first step, of the
            second, and so on; with `data.replay` over the very first, for ever. Leaving ends the background
            thread.

        Raises:
            UserError: (from the iterator) too many images are broken.
        """

        batching = self.batching.times(times)

        def requests() -> Iterator[Request]:
            for step in range(first_step, last_step):
                for micro_batch in micro_batches:
                    yield self._training_request(stage, step, micro_batch, batching)

        return self._replayed(requests) if self.data.replay else self._served("train", requests)

    def evaluation(
        self, split: SplitName, *, batch: int, rank: int = 0, ranks: int = 1
    ) -> AbstractContextManager[Iterator[Batch]]:
        """Every image of a split once, over all ranks together, in its order and without augmentation; without those
        that are broken.

        Args:
            split: which images.
            batch: images of a batch; the very last may be shorter.
            rank: takes the batches rank, rank + ranks, ...
            ranks: how many share the split.

        Raises:
            UserError: the split has no images; or (from the iterator) too many images are broken.
        """
        images = self.dataset.split(split)
        batches = self.evaluation_batches(split, batch)

        def requests() -> Iterator[Request]:
            for number in range(rank, batches, ranks):
                positions = np.arange(number * batch, min((number + 1) * batch, len(images)))
                yield Request(positions, self._plain_plan(images, positions))

        return self._served(split, requests)

    def evaluation_batches(self, split: SplitName, batch: int) -> int:
        """Batches that `evaluation` gives over all ranks."""
        return -(-len(self.dataset.split(split)) // batch)

    def calibration(
        self, *, images: int, batch: int, augment: bool, seed: int, rank: int = 0, ranks: int = 1
    ) -> AbstractContextManager[Iterator[tuple[int, Batch]]]:
        """A fixed draw of training images in a fixed order, with the index of each batch.

        Args:
            images: how many; 0, or more than there are, takes all of them.
            batch: images of a batch; the last may be shorter, down to two.
            augment: as in training, image by image, without mixing them (see `mixed_plan`); else as in validation.
            seed: of the draw and of the augmentation.
            rank: takes the batches rank, rank + ranks, ...
            ranks: how many share the images.

        Raises:
            UserError: from the iterator: too many images are broken.
        """
        train = self.dataset.train
        batches = self.calibration_batches(images, batch)
        drawn = philox(seed, "calibration").permutation(len(train))[: images or None]

        def requests() -> Iterator[Request]:
            for number in range(rank, batches, ranks):
                positions = drawn[number * batch : (number + 1) * batch]
                draws = _keyed(seed, "calibration ", number)
                augmented = partial(self._augmented_plan, train, draws=draws)
                yield _request(train, positions, augmented if augment else partial(self._plain_plan, train))

        return _numbered(range(rank, batches, ranks), self._served("train", requests))

    def calibration_batches(self, images: int, batch: int) -> int:
        """Batches that `calibration` gives over all ranks."""
        there = len(self.dataset.train)
        taken = min(images or there, there)
        # Batch norm has no variance over a single image: one that is left over is left out.
        return taken // batch if taken % batch == 1 and taken > 1 else -(-taken // batch)

    def _training_request(self, stage: int, step: int, micro_batch: int, batching: Batching) -> Request:
        positions = self._order.samples(stage, step, micro_batch, batching)
        draws = _keyed(self.seed, "", stage, step, micro_batch)
        train = self.dataset.train

        def plan(positions: NDArray[np.int64]) -> Plan:
            return mixed_plan(self._augmented_plan(train, positions, draws), self.data, draws)

        return _request(train, positions, plan)

    def _augmented_plan(self, split: Split, positions: NDArray[np.int64], draws: Draws) -> Plan:
        if isinstance(split, Index):
            return training_plan(split.sizes[positions], self.data, draws)
        return padded_plan(len(positions), split.images.shape[1], self.data, draws)

    def _plain_plan(self, split: Split, positions: NDArray[np.int64]) -> Plan:
        if isinstance(split, Index):
            return centre_plan(split.sizes[positions], self.data)
        return whole_plan(len(positions), split.images.shape[1])

    def _loader_of(self, name: SplitName) -> Loader:
        if name not in self._loaders:
            split = self.dataset.split(name)
            if not isinstance(split, Index):
                self._loaders[name] = ResidentLoader(split, self.device)
            elif self.loader == "dali":
                self._loaders[name] = DaliLoader(split, self.data.threads, self.device, self.faults)
            else:
                self._loaders[name] = TorchvisionLoader(split, self.data.threads, self.device, self.faults)
        return self._loaders[name]

    @contextmanager
    def _served(self, name: SplitName, requests: Callable[[], Iterator[Request]]) -> Iterator[Iterator[Batch]]:
        loader, split = self._loader_of(name), self.dataset.split(name)

        def loaded() -> Generator[Loaded, None, None]:
            return loader.stream(requests())

        def finished() -> Generator[Batch, None, None]:
            with closing(loaded()) as stream:
                for request, images in stream:
                    yield self._batch(split, request, images)

        if self.device.type == "cpu":
            with Prefetch(finished, self.data.prefetch) as batches:
                yield batches
        else:
            # For a GPU finishing is a few launches: made by the thread that makes the network's.
            with Prefetch(loaded, self.data.prefetch) as ahead:
                yield (self._batch(split, request, images) for request, images in ahead)

    @contextmanager
    def _replayed(self, requests: Callable[[], Iterator[Request]]) -> Iterator[Iterator[Batch]]:
        with self._served("train", lambda: islice(requests(), 1)) as served:
            first = list(served)
        yield cycle(first)

    def _batch(self, split: Split, request: Request, images: Tensor) -> Batch:
        labels = torch.from_numpy(split.labels[request.positions].astype(np.int64)).to(self.device, non_blocking=True)
        mixing = request.plan.mixing
        mixed = None if mixing is None else mixed_targets(labels, self.dataset.num_classes, mixing)
        return Batch(
            images=self._finish(images, request.plan).to(self._dtype),
            labels=labels,
            positions=torch.from_numpy(request.positions).to(self.device, non_blocking=True),
            targets=labels if mixed is None else mixed.to(self._dtype),
        )


@contextmanager
def _numbered(
    numbers: Sequence[int], served: AbstractContextManager[Iterator[Batch]]
) -> Iterator[Iterator[tuple[int, Batch]]]:
    with served as batches:
        yield zip(numbers, batches, strict=False)


def _request(split: Split, positions: NDArray[np.int64], draw: Callable[[NDArray[np.int64]], Plan]) -> Request:
    """One in which stand-ins take the places of broken images: of those known now, and of those found when read."""
    if isinstance(split, Index):
        positions = split.replaced(positions)
    return Request(positions, draw(positions), draw)


def _keyed(seed: int, prefix: str, *counters: int) -> Draws:
    return lambda purpose: philox(seed, prefix + purpose, *counters)


def _loader_name(split: Split, data: Data) -> str:
    if not isinstance(split, Index):
        return "resident"
    if data.loader == "auto":
        return "dali" if available() else "torchvision"
    return data.loader
