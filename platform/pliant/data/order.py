"""Which training image stands at which place of the run: a pure function of the place.

An epoch goes through one permutation of the images, cut into global batches and these into micro-batches.
What is left at its end, fewer images than a global batch, is dropped, or opens a last step that goes on with the
epoch's first images. Either way an epoch is a whole number of steps, and no image comes twice in it before each has
come once.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pliant.experiment import Batching
from pliant.randomness import philox

Tail = Literal["drop", "wrap"]


def steps_per_epoch(images: int, global_batch: int, tail: Tail) -> int:
    """Steps of one epoch: the whole global batches in `images`, with wrap also the one that is begun."""
    return images // global_batch if tail == "drop" else -(-images // global_batch)


class Order:
    """The order of the training images. Holds one epoch's permutation at a time; any place may be asked for."""

    def __init__(self, images: int, seed: int, tail: Tail) -> None:
        """For `images` images, numbered from 0."""
        self.images = images
        self.seed = seed
        self.tail: Tail = tail
        self._kept: tuple[tuple[int, int], NDArray[np.int64]] | None = None

    def epoch_of(self, step: int, batching: Batching) -> int:
        """The epoch that `step` of a stage belongs to, both from 0."""
        return step // steps_per_epoch(self.images, batching.images, self.tail)

    def permutation(self, stage: int, epoch: int) -> NDArray[np.int64]:
        """(images,): the order of one epoch of a stage."""
        if self._kept is None or self._kept[0] != (stage, epoch):
            self._kept = (stage, epoch), philox(self.seed, "order", stage, epoch).permutation(self.images)
        return self._kept[1]

    def samples(self, stage: int, step: int, micro_batch: int, batching: Batching) -> NDArray[np.int64]:
        """The images of one micro-batch, (batching.micro,), each in [0, images).

        Args:
            stage: index of the stage.
            step: index of the step in its stage.
            micro_batch: index in the global batch, whichever rank runs it.
            batching: sizes of the global batch and its micro-batches.
        """
        epoch, step_of_epoch = divmod(step, steps_per_epoch(self.images, batching.images, self.tail))
        first = step_of_epoch * batching.images + micro_batch * batching.micro
        places = np.arange(first, first + batching.micro) % self.images
        return self.permutation(stage, epoch)[places]
