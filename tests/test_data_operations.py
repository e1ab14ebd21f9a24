"""RandAugment and AutoAugment are torchvision's, image by image, for a whole batch at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.data.operations import changed
from pliant.data.policies import OPERATIONS, Operations, autoaugment, magnitudes, randaugment
from pliant.experiment import Data
from pliant.randomness import philox
from pliant.torchvision_cpu import make_importable

make_importable()
from torchvision.transforms import v2

theirs: Any = import_module("torchvision.transforms.v2._auto_augment")

POLICIES = {
    "imagenet": v2.AutoAugmentPolicy.IMAGENET,
    "cifar10": v2.AutoAugmentPolicy.CIFAR10,
    "svhn": v2.AutoAugmentPolicy.SVHN,
}
SIGNED = {name for name, (_, signed) in v2.AutoAugment._AUGMENTATION_SPACE.items() if signed}


def pixels(images: int, side: int, seed: int = 0) -> torch.Tensor:
    """Smooth colours: of noise, Equalize and Sharpness make little."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(images, 3, 5, 5, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear") * 230 + 10
    return fine.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def assert_same_images(got: torch.Tensor, want: Sequence[torch.Tensor], say: Sequence[object]) -> None:
    for one, other, what in zip(got, want, say, strict=True):
        assert torch.equal(one, other), what


@pytest.mark.parametrize("kind", [v2.RandAugment, v2.AutoAugment])
@pytest.mark.parametrize("bins", [10, 31])
@pytest.mark.parametrize("side", [32, 224, 331])
def test_magnitudes_are_torchvision_s(kind, bins, side):
    for name, (levels, _) in kind._AUGMENTATION_SPACE.items():
        expected = levels(bins, side, side)
        got = magnitudes(bins, side)[OPERATIONS.index(name)]
        np.testing.assert_array_equal(got, np.zeros(bins) if expected is None else expected.numpy(), err_msg=name)


@pytest.mark.parametrize("fill", [(0, 0, 0), (124, 116, 104)])
@pytest.mark.parametrize(("transform", "bins"), [(v2.RandAugment, 31), (v2.AutoAugment, 10)])
def test_every_operation_at_every_magnitude_is_torchvision_s(transform, bins, fill):
    side = 24
    reference = transform(fill=list(fill) if any(fill) else None)
    cases = []
    for name, (levels, signed) in transform._AUGMENTATION_SPACE.items():
        values = levels(bins, side, side)
        for value in [0.0] if values is None else values.tolist():
            cases += [(name, sign * value) for sign in ((1, -1) if signed else (1,))]
    images = pixels(len(cases), side)
    want = [
        reference._apply_image_or_video_transform(image, name, magnitude, reference.interpolation, reference._fill)
        for image, (name, magnitude) in zip(images.clone(), cases, strict=True)
    ]
    kind = np.array([[OPERATIONS.index(name)] for name, _ in cases], np.int8)
    magnitude = np.array([[value] for _, value in cases], np.float32)
    got = changed(images, Operations(kind, magnitude, fill))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_same_images(got, want, cases)


class Handed:
    """torch, except that its global draws are handed in."""

    def __init__(self) -> None:
        self.integers: list[int] = []
        self.floats: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randint(self, high: int, size: tuple[int, ...]) -> torch.Tensor:
        assert 0 <= self.integers[0] < high
        return torch.tensor(self.integers.pop(0))

    def rand(self, size: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(self.floats.pop(0), dtype=torch.float64)

    @property
    def spent(self) -> bool:
        return not self.integers and not self.floats


@pytest.fixture(scope="module")
def handed():
    with pytest.MonkeyPatch.context() as patch:
        stand_in = Handed()
        patch.setattr(theirs, "torch", stand_in)
        yield stand_in


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63 - 1), ops=st.integers(1, 4), magnitude=st.integers(0, 30))
def test_randaugment_does_with_its_draws_what_torchvision_does(handed, seed, ops, magnitude):
    images, side = 12, 20
    data = Data(augment="randaugment", augment_ops=ops, augment_magnitude=magnitude)
    plan = randaugment(images, side, data, philox(seed, "operations"))
    generator = philox(seed, "operations")
    kinds = generator.integers(14, size=(images, ops))
    turns = generator.random((images, ops))
    transform = v2.RandAugment(ops, magnitude)
    want = []
    for image, own, turn in zip(pixels(images, side), kinds, turns, strict=True):
        names = [list(transform._AUGMENTATION_SPACE)[kind] for kind in own]
        handed.integers += own.tolist()
        handed.floats += [value for name, value in zip(names, turn.tolist(), strict=True) if name in SIGNED]
        want.append(transform(image.clone()))
        assert handed.spent
    assert_same_images(changed(pixels(images, side), plan), want, kinds)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**63 - 1), policy=st.sampled_from(sorted(POLICIES)))
def test_autoaugment_does_with_its_draws_what_torchvision_does(handed, seed, policy):
    images, side = 25, 20
    plan = autoaugment(images, side, Data(augment="autoaugment"), policy, philox(seed, "operations"))
    generator = philox(seed, "operations")
    pairs = generator.integers(25, size=images)
    chances, turns = generator.random((images, 2)), generator.random((images, 2))
    transform = v2.AutoAugment(POLICIES[policy])
    want = []
    for image, pair, chance, turn in zip(pixels(images, side), pairs, chances, turns, strict=True):
        handed.integers.append(int(pair))
        for (name, probability, _), applies, turned in zip(transform._policies[pair], chance, turn, strict=True):
            handed.floats.append(float(applies))
            if applies < probability and name in SIGNED:
                handed.floats.append(float(turned))
        want.append(transform(image.clone()))
        assert handed.spent
    assert_same_images(changed(pixels(images, side), plan), want, pairs)


def chi_square(counts: Sequence[int], shares: Sequence[float]) -> float:
    """In standard deviations above its mean."""
    expected = np.array(shares) * sum(counts)
    freedom = len(counts) - 1
    return float((((np.array(counts) - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_randaugment_draws_every_pair_of_operations_and_both_signs_alike():
    plan = randaugment(40_000, 32, Data(augment="randaugment"), philox(3, "operations"))
    pairs = Counter(map(tuple, plan.kind.tolist()))
    assert len(pairs) == 14 * 14
    assert chi_square(list(pairs.values()), [1 / 196] * 196) < 4
    signed = np.isin(plan.kind, [OPERATIONS.index(name) for name in SIGNED])
    negative = plan.magnitude < 0
    assert not negative[~signed].any()
    assert chi_square([negative[signed].sum(), (~negative[signed]).sum()], [0.5, 0.5]) < 4
    assert chi_square(np.unique(negative[signed.all(1)] @ [1, 2], return_counts=True)[1].tolist(), [0.25] * 4) < 4


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_autoaugment_applies_each_operation_as_often_as_its_policy_says(policy):
    images = 40_000
    plan = autoaugment(images, 32, Data(augment="autoaugment"), policy, philox(3, "operations"))
    table = v2.AutoAugment(POLICIES[policy])._policies
    for slot in (0, 1):
        expected = Counter({"Identity": 0.0})
        for pair in table:
            name, probability, _ = pair[slot]
            expected[name] += probability / 25
            expected["Identity"] += (1 - probability) / 25
        counts = Counter(OPERATIONS[kind] for kind in plan.kind[:, slot].tolist())
        names = [name for name, share in expected.items() if share > 0]
        assert set(counts) == set(names)
        assert chi_square([counts[name] for name in names], [expected[name] for name in names]) < 4


def test_what_an_image_goes_through_does_not_depend_on_its_batch():
    plan = randaugment(40, 20, Data(augment="randaugment", augment_ops=3), philox(1, "operations"))
    whole = changed(pixels(40, 20), plan)
    for part in (slice(0, 7), slice(7, 8), slice(8, 40)):
        assert torch.equal(changed(pixels(40, 20)[part], plan.part(part)), whole[part])


def test_a_batch_without_an_operation_comes_out_as_it_went_in():
    identity = Operations(np.zeros((4, 2), np.int8), np.zeros((4, 2), np.float32), (0, 0, 0))
    assert torch.equal(changed(pixels(4, 20), identity), pixels(4, 20))
