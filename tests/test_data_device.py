"""Colours, mirroring and normalisation of a batch equal those of its images one by one."""

import numpy as np
import pytest
import torch

from pliant.data.device import CIFAR10, GREY, IMAGENET, Finish, jitter_, mirrored
from pliant.data.erasing import drawn_erasing, erase_
from pliant.data.mixing import Mixing, mix_
from pliant.data.operations import changed
from pliant.data.plan import Plan
from pliant.data.policies import randaugment
from pliant.experiment import Data
from pliant.randomness import philox
from pliant.torchvision_cpu import make_importable

make_importable()
from torchvision.transforms.v2 import functional

CPU = torch.device("cpu")


def batch(images: int = 5, side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2)


def plan_with(images: int, **changes) -> Plan:
    flip = changes.pop("flip", np.zeros(images, np.bool_))
    return Plan(np.zeros((images, 4), np.int32), np.zeros((images, 2), np.int32), np.zeros((images, 2), np.int32),
                12, flip, **changes)  # fmt: skip


def normalised(images: torch.Tensor, of) -> torch.Tensor:
    return functional.normalize(images, list(of.mean), list(of.std))


@pytest.mark.parametrize("of", [IMAGENET, CIFAR10])
def test_normalisation(of):
    finished = Finish(of, CPU)(batch(), plan_with(5))
    assert finished.dtype == torch.float32
    assert finished.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(finished, normalised(batch().float() / 255, of), atol=1e-5, rtol=0)


def test_marked_images_are_mirrored():
    flip = np.array([True, False, True, True, False])
    finished = Finish(IMAGENET, CPU)(batch(), plan_with(5, flip=flip))
    plain = Finish(IMAGENET, CPU)(batch(), plan_with(5))
    for image, expected, marked in zip(finished, plain, flip, strict=True):
        assert torch.equal(image, expected.flip(2) if marked else expected)


def test_jitter_equals_torchvision_on_each_image():
    factors = np.random.default_rng(0).uniform(0.6, 1.4, (5, 3)).astype(np.float32)
    images = batch()
    rows = images.permute(0, 2, 3, 1).reshape(5, 12, 36).float()
    jitter_(rows, torch.from_numpy(factors), torch.tensor(GREY))
    for row, image, (brightness, contrast, saturation) in zip(rows, images, factors.tolist(), strict=True):
        expected = functional.adjust_brightness(image.float() / 255, brightness)
        expected = functional.adjust_contrast(expected, contrast)
        expected = functional.adjust_saturation(expected, saturation)
        torch.testing.assert_close(row.view(12, 12, 3).permute(2, 0, 1), 255 * expected, atol=0.02, rtol=0)
        on_integers = functional.adjust_brightness(image, brightness)
        on_integers = functional.adjust_contrast(on_integers, contrast)
        on_integers = functional.adjust_saturation(on_integers, saturation)
        assert (row.view(12, 12, 3).permute(2, 0, 1) - on_integers).abs().max() <= 4  # it rounds down three times


def test_factors_of_one_change_nothing():
    rows = batch().permute(0, 2, 3, 1).reshape(5, 12, 36).float()
    changed = rows.clone()
    jitter_(changed, torch.ones(5, 3), torch.tensor(GREY))
    torch.testing.assert_close(changed, rows)


def test_lighting_adds_the_principal_components():
    amounts = np.array([[0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1], [0, 0, 0], [0.05, -0.2, 0.1]], np.float32)
    finished = Finish(IMAGENET, CPU)(batch(), plan_with(5, lighting=amounts))
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    for image, lit, amount in zip(batch(), finished, torch.from_numpy(amounts), strict=True):
        expected = normalised(image.float() / 255 + (vectors @ (amount * values))[:, None, None], IMAGENET)
        torch.testing.assert_close(lit, expected, atol=1e-5, rtol=0)


def test_what_happens_to_an_image_does_not_depend_on_its_batch():
    generator = np.random.default_rng(1)
    jitter = generator.uniform(0.6, 1.4, (5, 3)).astype(np.float32)
    lighting = generator.normal(0, 0.1, (5, 3)).astype(np.float32)
    flip = np.array([True, False, False, True, True])
    together = Finish(IMAGENET, CPU)(batch(), plan_with(5, jitter=jitter, lighting=lighting, flip=flip))
    for number in range(5):
        one = slice(number, number + 1)
        alone = Finish(IMAGENET, CPU)(
            batch()[one], plan_with(1, jitter=jitter[one], lighting=lighting[one], flip=flip[one])
        )
        torch.testing.assert_close(alone[0], together[number], atol=1e-6, rtol=1e-6)


def test_mirrored_first_then_operations_colours_erasing_and_mixing():
    generator = np.random.default_rng(1)
    flip = np.array([True, False, False, True, True])
    colours = dict(
        jitter=generator.uniform(0.6, 1.4, (5, 3)).astype(np.float32),
        lighting=generator.normal(0, 0.1, (5, 3)).astype(np.float32),
    )
    operations = randaugment(5, 12, Data(augment="randaugment", augment_ops=4), philox(2, "operations"))
    erasing = drawn_erasing(5, 12, Data(erasing=1.0, erasing_mode="pixel"), philox(2, "erasing"))
    mixing = Mixing(0.7)
    plan = plan_with(5, flip=flip, **colours, operations=operations, erasing=erasing, mixing=mixing)
    finished = Finish(IMAGENET, CPU)(batch(), plan)
    expected = Finish(IMAGENET, CPU)(changed(mirrored(batch(), flip), operations), plan_with(5, **colours))
    erase_(expected, erasing)
    mix_(expected, mixing)
    assert torch.equal(finished, expected)
    assert finished.is_contiguous(memory_format=torch.channels_last)
