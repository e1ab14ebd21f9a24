"""Random erasing is timm's, given its draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.data.erasing import drawn_erasing, erase_
from pliant.experiment import Data
from pliant.randomness import philox
from pliant.torchvision_cpu import make_importable

make_importable()
from timm.data import random_erasing

MODES = ("const", "rand", "pixel")


class Handed:
    """Python's `random`, for one image, with what it answers handed in."""

    def __init__(self, chance: float, areas: np.ndarray, aspects: np.ndarray, place: np.ndarray) -> None:
        self.chance = chance
        self.uniforms = [float(value) for pair in zip(areas, aspects, strict=True) for value in pair]
        self.places = place.tolist()

    def random(self) -> float:
        return self.chance

    def uniform(self, low: float, high: float) -> float:
        value = self.uniforms.pop(0)
        assert low <= value <= high
        return value

    def randint(self, low: int, high: int) -> int:
        return low + math.floor(self.places.pop(0) * (high - low + 1))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=30)
@given(seed=st.integers(0, 2**63 - 1), side=st.integers(2, 40), probability=st.sampled_from((0.25, 1.0)))
def test_erased_pixels_are_timm_s(mode, seed, side, probability):
    images = 9
    data = Data(erasing=probability, erasing_mode=mode)
    erasing = drawn_erasing(images, side, data, philox(seed, "erasing"))
    generator = philox(seed, "erasing")
    chances = generator.random(images)
    areas = generator.uniform(0.02, 1 / 3, (images, 10))
    aspects = generator.uniform(math.log(0.3), math.log(1 / 0.3), (images, 10))
    places = generator.random((images, 2))
    start = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    got = start.contiguous(memory_format=torch.channels_last)
    erase_(got, erasing)
    used = 0
    for number in range(images):

        def noise(per_pixel, rand_color, size, number=number, **_):
            nonlocal used
            if not per_pixel and not rand_color:
                return torch.zeros(3, 1, 1)
            assert erasing.colours is not None
            if rand_color:
                return torch.from_numpy(erasing.colours[number])[:, None, None]
            used += size[1] * size[2]
            return (
                torch.from_numpy(erasing.colours[used - size[1] * size[2] : used]).view(*size[1:], 3).permute(2, 0, 1)
            )

        with pytest.MonkeyPatch.context() as patch:
            handed = Handed(chances[number], areas[number], aspects[number], places[number])
            patch.setattr(random_erasing, "random", handed)
            patch.setattr(random_erasing, "_get_pixels", noise)
            want = random_erasing.RandomErasing(probability, mode=mode, device="cpu")(start[number].clone())
        assert torch.equal(got[number], want), number
    if mode == "pixel":
        assert erasing.colours is not None
        assert used == len(erasing.colours)


def test_as_many_images_are_erased_as_asked_for_and_as_much_of_them():
    erasing = drawn_erasing(20_000, 224, Data(erasing=0.25), philox(0, "erasing"))
    shares = erasing.box[:, 2] * erasing.box[:, 3] / 224**2
    assert (shares > 0).mean() == pytest.approx(0.25, abs=0.01)
    assert shares[shares > 0].min() > 0.019
    assert shares.max() < 0.34
    assert shares[shares > 0].mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.005)
    assert (erasing.box[:, :2] >= 0).all()
    assert (erasing.box[:, :2] + erasing.box[:, 2:] <= 224).all()


def test_noise_and_colours_are_standard_normal():
    for mode in ("rand", "pixel"):
        colours = drawn_erasing(3000, 32, Data(erasing=0.5, erasing_mode=mode), philox(0, "erasing")).colours
        assert colours is not None
        assert colours.mean() == pytest.approx(0, abs=0.04)
        assert colours.std() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_erased_from_an_image_does_not_depend_on_its_batch(mode):
    erasing = drawn_erasing(20, 16, Data(erasing=0.7, erasing_mode=mode), philox(4, "erasing"))
    start = torch.randn(20, 3, 16, 16)
    whole = start.clone()
    erase_(whole, erasing)
    assert not torch.equal(whole, start)
    for part in (slice(0, 5), slice(5, 6), slice(6, 20)):
        alone = start[part].clone()
        erase_(alone, erasing.part(part))
        assert torch.equal(alone, whole[part])
