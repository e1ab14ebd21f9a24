"""Every loader cuts the same crop out of the same image."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pliant.data import open_dataset
from pliant.data.index import Index, Pixels, scan
from pliant.data.loaders import Request, execute
from pliant.data.loaders.dali import DaliLoader
from pliant.data.loaders.resident import ResidentLoader
from pliant.data.loaders.torchvision import TorchvisionLoader
from pliant.data.plan import PAD, Plan, centre_plan, padded_plan, training_plan, whole_plan
from pliant.experiment import Data
from pliant.randomness import philox
from pliant.torchvision_cpu import make_importable

make_importable()
from torchvision.transforms import v2

CPU = torch.device("cpu")
LOADERS = [
    pytest.param(DaliLoader, marks=pytest.mark.skipif(find_spec("nvidia") is None, reason="DALI is not installed")),
    TorchvisionLoader,
]

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def odd_photos(shared_data, tmp_path) -> Path:
    """The readable photographs of photos_odd, each in a folder of its own; the truncated one lies beside."""
    for photo in sorted((shared_data / "photos_odd").glob("*.JPEG")):
        folder = tmp_path / "truncated" if "truncated" in photo.name else tmp_path / "odd" / photo.name[:9]
        folder.mkdir(parents=True)
        shutil.copy(photo, folder)
    return tmp_path / "odd"


def draws(purpose: str) -> np.random.Generator:
    return philox(3, purpose)


def stream(loader, index: Index, plan: Plan, chunk: int) -> Iterator[torch.Tensor]:
    """The images of a plan over all of an index, in batches."""
    parts = [slice(first, first + chunk) for first in range(0, len(index), chunk)]
    requests = [Request(np.arange(len(index))[part], plan.part(part)) for part in parts]
    for _, images in loader(index, 2, CPU).stream(requests):
        yield images


def load(loader, index: Index, plan: Plan, chunk: int = 64) -> torch.Tensor:
    """All of them at once."""
    return torch.cat(list(stream(loader, index, plan, chunk)))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("resize", [None, 32, 20, 57])
def test_centre_crops_equal_those_of_torchvision(loader, resize, tmp_path, draw_image):
    shapes = [(1, 1), (1, 9), (20, 31), (31, 20), (32, 32), (37, 37), (40, 61), (200, 47), (3, 100), (101, 99)]
    for number, shape in enumerate(shapes):
        draw_image(tmp_path / "train" / f"{number:02d}" / "image.png", *shape)
    index = open_dataset(Data(root=tmp_path), 0).train
    plan = centre_plan(index.sizes, Data(size=32, resize=resize))
    expected = v2.Compose([v2.PILToTensor(), v2.Resize(resize or 37), v2.CenterCrop(32)])
    images = load(loader, index, plan, chunk=4)
    assert images.is_contiguous(memory_format=torch.channels_last)
    for position, image in enumerate(images):
        with Image.open(index.path(position)) as opened:
            assert torch.equal(image, expected(opened.convert("RGB"))), shapes[position]


@pytest.mark.parametrize("loader", LOADERS)
def test_training_crops_equal_those_of_pillow_within_rounding(loader, image_folder):
    index = open_dataset(Data(root=image_folder), 0).train
    plan = training_plan(index.sizes, Data(size=24), draws)
    for position, image in enumerate(load(loader, index, plan)):
        top, left, height, width = plan.window[position].tolist()
        with Image.open(index.path(position)) as opened:
            crop = opened.crop((left, top, left + width, top + height))
            expected = np.asarray(crop.resize((24, 24), Image.Resampling.BILINEAR), np.int64)
        difference = np.abs(image.permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 2  # torch and Pillow round after each of two directions
        assert difference.mean() <= 0.3


@pytest.mark.parametrize("kind", ["training", "centre"])
@pytest.mark.parametrize("folder", ["photos", "odd"])
def test_dali_and_torchvision_agree_on_photographs(folder, kind, shared_data, odd_photos):
    pytest.importorskip("nvidia.dali")
    index = scan(shared_data / "photos" if folder == "photos" else odd_photos, None)
    if folder == "photos" and kind == "centre":
        index = index.subset(np.arange(0, len(index), 4))
    data = Data()
    plan = training_plan(index.sizes, data, draws) if kind == "training" else centre_plan(index.sizes, data)
    streams = [stream(loader, index, plan, chunk=16) for loader in (DaliLoader, TorchvisionLoader)]
    difference = torch.cat(
        [(one.float() - other).abs().mean(dim=(1, 2, 3)) for one, other in zip(*streams, strict=True)]
    )
    assert len(difference) == len(index)
    assert difference.median() <= 0.1
    assert difference.max() <= 1.5


@pytest.mark.parametrize("loader", LOADERS)
def test_no_requests_no_images(loader, image_folder):
    index = open_dataset(Data(root=image_folder), 0).train
    assert list(loader(index, 1, CPU).stream([])) == []


def test_resident_crops_equal_those_of_a_loop():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    loader = ResidentLoader(Pixels(images, np.zeros(50, np.int32), ("a", "b")), CPU)
    positions = generator.integers(0, 50, 200)
    plan = padded_plan(200, 32, Data(source="cifar10"), draws)
    cropped = execute(loader, positions, plan)
    assert cropped.is_contiguous(memory_format=torch.channels_last)
    for crop, position, (top, left) in zip(cropped, positions, plan.offset, strict=True):
        padded = np.pad(images[position], ((PAD, PAD), (PAD, PAD), (0, 0)))
        expected = padded[PAD + top : PAD + top + 32, PAD + left : PAD + left + 32]
        np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), expected)
    whole = execute(loader, positions, whole_plan(200, 32))
    np.testing.assert_array_equal(whole.permute(0, 2, 3, 1).numpy(), images[positions])
