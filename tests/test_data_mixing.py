"""mixup and CutMix are timm's, given their draws, and so is what a loss makes of their labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from pliant.data.mixing import Mixing, drawn_mixing, mix_, mixed_targets
from pliant.experiment import Data
from pliant.randomness import philox
from pliant.torchvision_cpu import make_importable

make_importable()
from timm.data import mixup
from timm.loss import SoftTargetCrossEntropy

CLASSES = 7
MIXES = (dict(mixup=0.2), dict(cutmix=1.0), dict(mixup=0.8, cutmix=1.0))


class Handed:
    """NumPy, except that its global draws come from a generator, in the order in which ours are drawn."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.generator = generator
        self.random = self

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def rand(self) -> float:
        return self.generator.random()

    def beta(self, a: float, b: float) -> float:
        return self.generator.beta(a, b)

    def randint(self, low: int, high: int, size: None) -> np.integer:
        return self.generator.integers(low, high)


def batch(images: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    pixels = torch.randn(images, 3, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    return pixels, torch.randint(CLASSES, (images,), generator=generator)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**63 - 1),
    mixes=st.sampled_from(MIXES),
    probability=st.sampled_from((0.5, 1.0)),
    half=st.integers(1, 4),
    side=st.integers(1, 33),
    smoothing=st.sampled_from((0.0, 0.1)),
)
def test_images_targets_and_loss_are_timm_s(seed, mixes, probability, half, side, smoothing):
    data = Data(mix_probability=probability, **mixes)
    mixing = drawn_mixing(side, data, philox(seed, "mixing"))
    images, labels = batch(2 * half, side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixup, "np", Handed(philox(seed, "mixing")))
        timm = mixup.Mixup(data.mixup, data.cutmix, prob=probability, label_smoothing=smoothing, num_classes=CLASSES)
        theirs, soft = timm(images.clone(), labels)
    mix_(images, mixing)
    assert torch.equal(images, theirs)
    targets = mixed_targets(labels, CLASSES, mixing)
    if smoothing == 0.0:
        assert torch.equal(targets, soft)
    logits = torch.randn(2 * half, CLASSES, generator=torch.Generator().manual_seed(1))
    expected = SoftTargetCrossEntropy()(logits, soft)
    torch.testing.assert_close(cross_entropy(logits, targets, label_smoothing=smoothing), expected)


@given(seed=st.integers(0, 1000), mixes=st.sampled_from(MIXES))
def test_an_image_s_share_of_its_label_is_the_share_of_its_pixels(seed, mixes):
    """A batch of one black and one white image shows how much of each is where."""
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    mixing = drawn_mixing(16, Data(**mixes), philox(seed, "mixing"))
    mix_(images, mixing)
    targets = mixed_targets(torch.tensor([0, 1]), 2, mixing)
    torch.testing.assert_close(images.mean((1, 2, 3)), targets[:, 1])
    torch.testing.assert_close(targets.sum(1), torch.ones(2))


def test_middle_of_an_odd_batch_stays_as_it_is():
    images, labels = batch(5, 8)
    for mixing in (Mixing(0.3), Mixing(1 - 12 / 64, (1, 4, 2, 6))):
        mixed = images.clone()
        mix_(mixed, mixing)
        torch.testing.assert_close(mixed[2], images[2])
        assert not torch.equal(mixed[1], images[1])
        assert mixed_targets(labels, CLASSES, mixing)[2].argmax() == labels[2]


def test_as_many_micro_batches_are_mixed_as_asked_for_and_by_the_shares_asked_for():
    data = Data(mixup=0.8, cutmix=1.0, mix_probability=0.6, switch_probability=0.25)
    drawn = [drawn_mixing(64, data, philox(0, "mixing", number)) for number in range(6000)]
    blended = [one.share for one in drawn if one.box is None and one.share != 1.0]
    cut = [one.share for one in drawn if one.box is not None]
    assert len(blended) / len(drawn) == pytest.approx(0.6 * 0.75, abs=0.025)
    assert len(cut) / len(drawn) == pytest.approx(0.6 * 0.25, abs=0.02)
    assert np.var(blended) == pytest.approx(0.25 / (2 * 0.8 + 1), rel=0.06)  # of Beta(0.8, 0.8)
    assert np.mean(blended) == pytest.approx(0.5, abs=0.02)
