"""What several tests share."""

from __future__ import annotations

import os

# Before torch starts its threads, as pliant.cli does for a user.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Tests compare with one process on a CPU, whatever the machine has and whoever started them.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in [name for name in os.environ if name.startswith(("ACCELERATE_", "SLURM_", "TORCHELASTIC_"))]:
    del os.environ[_name]
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FORCE_COLOR"):
    os.environ.pop(_name, None)

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """A training in this process sets how many threads there are: for this test alone."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_child_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that fails halfway leaves processes that wait for each other, and the machine busy for all later ones."""
    started: list[subprocess.Popen[Any]] = []

    class Noted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session", autouse=True)
def suite_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for this run of the tests: an index that an earlier one left would hide how this one is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of photographs, CIFAR-10 and weights beside the repository, or where PLIANT_TEST_DATA
    says."""
    folder = Path(os.environ.get("PLIANT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}: name their folder in PLIANT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def cifar10(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of CIFAR-10 in its binary layout."""
    root = tmp_path_factory.mktemp("cifar10")
    unpack = shared_data / "unpack_cifar10.py"
    subprocess.run([sys.executable, str(unpack), str(root), "--bin"], check=True, capture_output=True)
    return root


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for this test alone."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def draw_image() -> Callable[[Path, int, int], Path]:
    """Writes an image file of a given height and width: coloured noise, smooth enough to be resized."""

    def draw(path: Path, height: int, width: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng([height, width, *path.name.encode()])
        coarse = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(path)
        return path

    return draw


@pytest.fixture
def image_folder(tmp_path: Path, draw_image: Callable[[Path, int, int], Path], own_cache: Path) -> Path:
    """A small dataset: three classes of eight training images and of three validation images each."""
    root = tmp_path / "images"
    for split, images in (("train", 8), ("val", 3)):
        for number, name in enumerate(("cat", "dog", "newt")):
            for image in range(images):
                draw_image(root / split / name / f"{image}.png", 40 + 3 * image, 64 - 5 * image + number)
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)
