"""Plans follow torchvision's rules and stay inside the image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pliant.data import plan as plan_module
from pliant.data.index import scan
from pliant.data.loaders import execute
from pliant.data.loaders.torchvision import TorchvisionLoader
from pliant.data.plan import PAD, centre_plan, padded_plan, training_plan
from pliant.experiment import Data
from pliant.randomness import philox
from pliant.torchvision_cpu import make_importable

make_importable()
from torchvision.transforms import v2

sides = st.one_of(st.integers(1, 20), st.integers(1, 20_000))
shapes = st.lists(st.tuples(sides, sides), min_size=1, max_size=8)


def draws(seed: int):
    return lambda purpose: philox(seed, purpose)


@given(shapes=shapes, seed=st.integers(0, 1000), low=st.floats(0.001, 1.0))
def test_windows_lie_inside_the_image(shapes, seed, low):
    sizes = np.array([*shapes, (1, 1), (20_000, 3), (3, 20_000)], np.int32)
    plan = training_plan(sizes, Data(scale=(low, 1.0)), draws(seed))
    top, left, height, width = plan.window.T
    assert (plan.window[:, :2] >= 0).all()
    assert (plan.window[:, 2:] >= 1).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()


def reference_window(height, width, scale, shares, aspects, place):
    """torchvision's RandomResizedCrop.get_params, with its draws handed in."""
    for share, aspect in zip(shares, aspects, strict=True):
        w = round(math.sqrt(height * width * share * aspect))
        h = round(math.sqrt(height * width * share / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w
    ratio = width / height
    if ratio < 3 / 4:
        h, w = round(width / (3 / 4)), width
    elif ratio > 4 / 3:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@given(shapes=shapes, seed=st.integers(0, 1000))
def test_windows_equal_those_of_a_loop_over_the_same_draws(shapes, seed):
    sizes = np.array(shapes, np.int32)
    generator = philox(seed, "crop")
    shares = generator.uniform(0.08, 1.0, (len(sizes), 10))
    aspects = np.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3), (len(sizes), 10)))
    places = generator.random((len(sizes), 2))
    expected = [
        reference_window(*size, (0.08, 1.0), *drawn)
        for size, *drawn in zip(sizes.tolist(), shares, aspects, places, strict=True)
    ]
    np.testing.assert_array_equal(training_plan(sizes, Data(), draws(seed)).window, expected)


def test_windows_have_the_distribution_of_torchvision():
    number, height, width = 4000, 375, 500
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = v2.RandomResizedCrop(224, scale=(0.25, 1.0))
    theirs = np.array([list(crop.make_params([image]).values()) for _ in range(number)])
    sizes = np.tile(np.array([[height, width]], np.int32), (number, 1))
    ours = training_plan(sizes, Data(scale=(0.25, 1.0)), draws(0)).window
    for of in (
        lambda window: window[:, 2] * window[:, 3],
        lambda window: window[:, 2] / window[:, 3],
        lambda window: window[:, 0],
        lambda window: window[:, 1],
    ):
        values = np.sort(np.concatenate([of(ours), of(theirs)]))
        distance = [np.searchsorted(np.sort(of(part)), values, "right") / number for part in (ours, theirs)]
        assert np.abs(distance[0] - distance[1]).max() < 0.045  # 1 in 1000 for equal distributions


@pytest.mark.parametrize("resize", [None, 40, 32, 20])
@given(height=st.integers(1, 90), width=st.integers(1, 90))
def test_centre_plan_has_the_numbers_of_torchvision(resize, height, width):
    data = Data(size=32, resize=resize)
    plan = centre_plan(np.array([[height, width]], np.int32), data)
    resized = v2.Resize(resize or 37)(torch.zeros(1, height, width, dtype=torch.uint8)).shape[1:]
    assert tuple(plan.resized[0]) == tuple(resized)
    rows, columns = (torch.arange(1, side + 1) for side in resized)  # 0 will mean padding
    cropped = v2.CenterCrop(32)(torch.stack(torch.meshgrid(rows, columns, indexing="ij")))
    inside = (cropped[0] > 0).nonzero()
    corner = cropped[:, inside[0, 0], inside[0, 1]] - 1
    assert tuple(plan.offset[0]) == tuple((corner - inside[0]).tolist())


@example(short=5, long=471, size=1, resize=471, upright=False)
@given(
    short=st.integers(1, 40),
    long=st.integers(1, 100_000),
    size=st.integers(1, 300),
    resize=st.one_of(st.none(), st.integers(1, 600)),
    upright=st.booleans(),
)
def test_no_image_grows_to_an_enormous_one(short, long, size, resize, upright):
    """Whatever its sides, and the square that is fed still lies where it did, to a pixel and a half."""
    sizes = np.array([(long, short) if upright else (short, long)], np.int32)
    data = Data(size=size, resize=resize)
    plan = centre_plan(sizes, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_ENORMOUS", 1 << 62)
        whole = centre_plan(sizes, data)
    shorter = whole.resized.min()
    assert plan.resized.astype(np.int64).prod() <= max(1 << 24, shorter**2 * (-(-size // shorter) + 3))
    if np.array_equal(plan.window, whole.window):
        np.testing.assert_array_equal(plan.resized, whole.resized)
        np.testing.assert_array_equal(plan.offset, whole.offset)
        return
    assert (plan.window[:, :2] >= 0).all()
    assert (plan.window[:, :2] + plan.window[:, 2:] <= sizes).all()
    axis = int(sizes[0].argmax())
    assert 0 <= plan.offset[0, axis] <= plan.resized[0, axis] - size
    # Where the square's middle lies in the stored image, in resized pixels.
    scale = shorter / sizes.min()
    middles = []
    for one in (plan, whole):
        stored = one.window[0, axis + 2] / one.resized[0, axis]
        middles.append(scale * (one.window[0, axis] + (one.offset[0, axis] + size / 2) * stored))
    # Each is rounded to a pixel, and the whole's length down to one, which moves its middle by half as much.
    assert abs(middles[0] - middles[1]) <= 1.51


@pytest.mark.parametrize("height_width", [(3, 900), (4, 901), (800, 2), (1, 500)])
def test_without_its_far_ends_an_image_looks_the_same(height_width, tmp_path, own_cache, monkeypatch):
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        pixels = generator.integers(0, 256, (*height_width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "x.png")
    index = scan(tmp_path, None)
    served = []
    for enormous in (1 << 62, 0):
        monkeypatch.setattr(plan_module, "_ENORMOUS", enormous)
        plan = centre_plan(index.sizes, Data(size=64))
        loader = TorchvisionLoader(index, 1, torch.device("cpu"))
        served.append(execute(loader, np.arange(2), plan).float())
    assert plan.window[0, 2:].max() < max(height_width)
    assert (served[0] - served[1]).abs().mean() < 3.0  # half a pixel of noise
    assert served[0].std() > 20


def test_switching_one_augmentation_on_leaves_the_others_alone():
    sizes = np.full((64, 2), 300, np.int32)
    plain = training_plan(sizes, Data(flip=False), draws(5))
    rich = training_plan(sizes, Data(jitter=0.4, lighting=0.1), draws(5))
    np.testing.assert_array_equal(plain.window, rich.window)
    assert not plain.flip.any()
    assert 16 < rich.flip.sum() < 48
    assert plain.jitter is None
    assert plain.lighting is None
    np.testing.assert_array_equal(rich.flip, training_plan(sizes, Data(), draws(5)).flip)
    assert rich.jitter is not None
    assert rich.lighting is not None
    assert rich.jitter.min() >= 0.6
    assert rich.jitter.max() <= 1.4
    assert 0.05 < rich.lighting.std() < 0.15


def test_padded_crops_reach_every_offset():
    plan = padded_plan(5000, 32, Data(source="cifar10"), draws(0))
    for axis in (0, 1):
        np.testing.assert_array_equal(np.unique(plan.offset[:, axis]), np.arange(-PAD, PAD + 1))
    assert plan.size == 32
    assert not padded_plan(100, 32, Data(source="svhn", padded_crop=False), draws(0)).offset.any()
