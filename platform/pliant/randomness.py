"""Draws that depend on where they are asked for, never on what was drawn before.

Every random number of a run comes from a counter-based generator (Philox, Salmon et al. 2011) keyed by the seed and
a purpose, and counted by (stage, step, micro-batch). So a run resumes from a step number alone, and another number of
ranks draws the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

_WHOLE_STEP = 2**63  # in the place of a micro-batch's index: a draw that all micro-batches of a step share


def philox(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments.

    Args:
        seed: the run's seed, in [0, 2**64).
        purpose: what is drawn; different purposes are independent.
        counters: up to three indices, each in [0, 2**64), for instance (stage, step, micro-batch).
    """
    if len(counters) > 3:
        raise ValueError(f"At most three counters, got {counters}.")
    digest = hashlib.blake2b(purpose.encode(), digest_size=8).digest()
    words = (*counters, *(0,) * (3 - len(counters)))
    # Arrays of 64 bits: a list with a number above 2**63 would be rounded to doubles, and neighbouring seeds be one.
    key = np.array([seed, int.from_bytes(digest, "little")], np.uint64)
    # The lowest word is left to the generator itself: 2**64 blocks of numbers for each place.
    counter = np.array([0, *reversed(words)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class Draw:
    """The draws of one iteration. `uniform` and `permutation` are the same in all micro-batches of a step."""

    seed: int
    stage: int
    step: int
    micro_batch: int
    """Index in the global batch, from 0: the same whichever rank runs it."""

    def shared(self, purpose: str) -> np.random.Generator:
        """A NumPy generator that all micro-batches of the step share."""
        return philox(self.seed, purpose, self.stage, self.step, _WHOLE_STEP)

    def own(self, purpose: str) -> np.random.Generator:
        """A NumPy generator of this micro-batch alone."""
        return philox(self.seed, purpose, self.stage, self.step, self.micro_batch)

    def uniform(self, low: float, high: float, number: int, purpose: str = "uniform") -> tuple[float, ...]:
        """`number` floats in [low, high), the same in all micro-batches of the step."""
        return tuple(self.shared(purpose).uniform(low, high, number).tolist())

    def permutation(self, number: int, purpose: str = "permutation") -> tuple[int, ...]:
        """0 … number - 1 in random order, the same in all micro-batches of the step."""
        return tuple(self.shared(purpose).permutation(number).tolist())

    def generator(self, device: torch.device | str = "cpu", purpose: str = "tensor") -> torch.Generator:
        """A torch generator of this micro-batch alone, for bulk tensors on `device`."""
        return torch.Generator(device).manual_seed(self.torch_seed(purpose))

    def torch_seed(self, purpose: str) -> int:
        """A seed in [0, 2**63) for torch's own generators, of this micro-batch alone."""
        return int(self.own(purpose).integers(2**63))
