"""The generated sample: the same for a seed, whole or absent, and no task for a linear classifier."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import generate_sample
from data.generate_sample import CLASSES, Refusal, Settings, generate, interrupts_held_back

SCRIPT = Path(generate_sample.__file__)


def small(root: Path, seed: int = 0, workers: int = 1) -> Settings:
    return Settings(root, images=60, held_out=20, seed=seed, workers=workers)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def run(*arguments: object) -> subprocess.Popen[str]:
    """Starts the script as the first process of a group of its own, as a shell does."""
    command = [sys.executable, *map(str, (SCRIPT, *arguments))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The worker processes of a run."""
    found = []
    for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for pid in map(int, children.read_text().split()):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.005)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample at its full size."""
    root = tmp_path_factory.mktemp("generated") / "sample"
    assert generate(Settings(root, workers=2))
    return root


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sample of seed 0, for reading only."""
    root = tmp_path_factory.mktemp("generated") / "few"
    assert generate(small(root))
    return root


def pixels(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images of 16 x 16 pixels, (B, 768) in 0 to 1, and their labels."""
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((root / split / name).iterdir()):
            images.append(np.asarray(Image.open(path).resize((16, 16), Image.Resampling.BOX)))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).flatten(1) / 255, torch.tensor(labels)


def linear_accuracy(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], decay: float) -> float:
    """Held-out accuracy of multinomial logistic regression."""
    classifier = torch.nn.Linear(train[0].shape[1], len(CLASSES))
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.cross_entropy(classifier(train[0]), train[1])
        value += decay / 2 * classifier.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((classifier(val[0]).argmax(1) == val[1]).float().mean())


def test_linear_classifier_stays_under_40_percent(sample: Path) -> None:
    (images, labels), (held_out, answers) = pixels(sample, "train"), pixels(sample, "val")
    mean, deviation = images.mean(0), images.std(0)
    train, val = ((images - mean) / deviation, labels), ((held_out - mean) / deviation, answers)
    accuracies = {decay: linear_accuracy(train, val, decay) for decay in (0.001, 0.01, 0.1, 1.0)}
    assert 0.1 < max(accuracies.values()) < 0.4, accuracies


def test_classes_are_balanced(sample: Path) -> None:
    for split, count in (("train", 400), ("val", 100)):
        folders = sorted((sample / split).iterdir())
        assert tuple(folder.name for folder in folders) == CLASSES
        assert [len(list(folder.iterdir())) for folder in folders] == [count] * len(CLASSES)


def test_difficulty_is_told_of_every_image_and_independent_of_the_class(sample: Path) -> None:
    with open(sample / "difficulty.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    names = {str(path.relative_to(sample)) for path in sample.rglob("*.jpeg")}
    assert {line["file"] for line in lines} == names
    labels = np.array([CLASSES.index(line["file"].split("/")[1]) for line in lines])
    ranges = dict(size=(0.25, 0.46), clutter=(0, 10), blur=(0, 1.8), contrast=(0.3, 0.9), noise=(0, 0.08))
    for name, (low, high) in ranges.items():
        values = np.array([float(line[name]) for line in lines])
        assert low <= values.min() < low + 0.25 * (high - low)
        assert high - 0.25 * (high - low) < values.max() <= high
        means = np.array([values[labels == label].mean() for label in range(len(CLASSES))])
        assert np.abs(means - values.mean()).max() < 5 * values.std() / np.sqrt(500)


def test_says_that_images_are_generated(sample: Path) -> None:
    facts = json.loads((sample / "sample.json").read_text())
    assert facts["images"] == "generated"
    assert (facts["seed"], facts["train"], facts["val"]) == (0, 4000, 1000)
    assert "generated by a program; they are not photographs" in (sample / "README.txt").read_text()


def test_same_files_for_a_seed_with_one_and_two_workers(few: Path, tmp_path: Path) -> None:
    generate(small(tmp_path / "sample", workers=2))
    assert contents(tmp_path / "sample") == contents(few)
    images = [data for name, data in contents(few).items() if name.endswith(".jpeg")]
    assert len(set(images)) == 80


def test_another_seed_gives_other_images(few: Path, tmp_path: Path) -> None:
    generate(small(tmp_path / "sample", seed=2**64 - 1))
    first, second = contents(few), contents(tmp_path / "sample")
    assert first.keys() == second.keys()
    assert not any(first[name] == second[name] for name in first if name.endswith(".jpeg"))


def test_a_complete_sample_is_left_as_it_is(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(generate_sample, "fill")
    before = contents(few)
    assert not generate(small(few, workers=2))
    assert contents(few) == before and not few.with_name("few.partial").exists()


def test_an_interrupted_run_leaves_nothing_that_looks_complete(few: Path, tmp_path: Path) -> None:
    root, partial = tmp_path / "sample", tmp_path / "sample.partial"
    process = run(root, "--workers", 1)
    while process.poll() is None and not list(partial.glob("train/*/*.jpeg")):
        time.sleep(0.05)
    with pytest.raises(Refusal, match="Another run is generating"):
        generate(small(root))
    process.kill()
    process.communicate()
    assert not root.exists() and not (partial / "sample.json").exists()
    assert generate(small(root)) and not partial.exists()
    assert contents(root) == contents(few)


def test_ctrl_c_while_workers_start_waits_until_they_did_and_never_reaches_them() -> None:
    masks = []

    @interrupts_held_back()
    def start() -> None:
        os.kill(os.getpid(), signal.SIGINT)  # taken by any thread of this process
        masks.append(subprocess.check_output(["grep", "SigBlk", "/proc/self/status"]))

    with pytest.raises(KeyboardInterrupt):
        start()
    assert [int(mask.split()[1], 16) & 1 << signal.SIGINT - 1 for mask in masks] == [2]


@pytest.mark.parametrize("seconds", [0.0, 0.2, None])
def test_ctrl_c_says_one_sentence_whether_workers_start_or_work(tmp_path: Path, seconds: float | None) -> None:
    process = run(tmp_path / "sample", "--workers", 2)
    if seconds is None:
        wait_for(lambda: list(tmp_path.glob("sample.partial/train/*/*.jpeg")), process)
    else:
        wait_for(lambda: len(workers(process)) == 2, process)
        time.sleep(seconds)
    started = workers(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == f"Stopped: {tmp_path / 'sample'} is not there yet; the same command begins again."
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    assert not (tmp_path / "sample").exists()


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    process = run(tmp_path / "sample", "--workers", 2)
    wait_for(lambda: list(tmp_path.glob("sample.partial/train/*/*.jpeg")), process)
    os.kill(workers(process)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "A worker was killed, perhaps for want of memory" in errors.splitlines()[-1]
    assert not (tmp_path / "sample").exists()


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    process = run(tmp_path / "sample", "--workers", 2)
    wait_for(lambda: list(tmp_path.glob("sample.partial/train/*/*.jpeg")), process)
    started = workers(process)
    assert len(started) == 2
    process.kill()
    process.communicate(timeout=30)  # its pipes close when the last of them has ended


def test_a_folder_that_is_something_else_is_refused(few: Path, tmp_path: Path) -> None:
    shutil.copytree(few, tmp_path / "sample")
    with pytest.raises(Refusal, match="no whole sample with these settings"):
        generate(small(tmp_path / "sample", seed=1))
    (tmp_path / "sample" / "val" / "star" / "00000.jpeg").unlink()
    with pytest.raises(Refusal, match="no whole sample"):
        generate(small(tmp_path / "sample"))
    with pytest.raises(Refusal, match="no whole sample"):
        generate(small(tmp_path))
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(Refusal, match=r"new\.partial exists"):
        generate(small(tmp_path / "new"))


OUT_OF_RANGE = [{"images": 9}, {"held_out": 0}, {"seed": -1}, {"seed": 2**64}, {"workers": 0}]


@pytest.mark.parametrize("options", OUT_OF_RANGE)
def test_settings_out_of_range_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(Refusal, match="10 images or more"):
        generate(Settings(tmp_path / "sample", **options))
    assert not list(tmp_path.iterdir())


def test_refusal_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    process = run(tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 2 and output == ""
    assert errors.count("\n") == 1 and errors.endswith("name another folder.\n")
    assert contents(tmp_path) == {"notes.txt": b"mine"}
