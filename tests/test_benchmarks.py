"""Every benchmark starts, measures and ends with its line of JSON; what it measures is not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pliant.networks.resnet import ResNet
from tests.runs import REPOSITORY, command, environment, finish, only_run, tiny_cifar
from tests.tiny_run import train_tiny

SHORTLY = {
    "augmentation": ("--rounds", "1", "--batch", "8", "--steps", "2"),
    "checkpoint_stall": ("--steps", "1", "--saves", "1", "--rounds", "1"),
    "communication": ("--backends", "ddp", "zero2"),
    "loading": ("--samples", "1200", "--batch", "16", "--rounds", "1"),
    "resident_epoch": ("--rounds", "1"),
    "sandwich_step": ("--rounds", "1", "--batch", "2", "--size", "64"),
    "skipping": ("--draws", "1"),
    "step_overhead": ("--turns", "1", "--steps", "1", "--small-turns", "1", "--small-steps", "2"),
}


def test_all_benchmarks_are_started_below() -> None:
    assert {script.stem for script in (REPOSITORY / "benchmarks").glob("*.py")} == SHORTLY.keys()


@pytest.mark.soak
@pytest.mark.parametrize("row", ["urnet", "blockdrop"])
def test_study_of_depth_trains_and_measures_a_row(row: str, tmp_path: Path) -> None:
    """Its stages, what stands at their boundary, times, and a frozen policy if there is one to freeze."""
    for depth in (20, 32):
        save_file(ResNet(depth=depth, shortcut="pad").build(10).state_dict(), tmp_path / f"{depth}.safetensors")
    folders = ("--root", str(tiny_cifar(tmp_path / "data")), "--runs", str(tmp_path / "runs"))
    weights = ("--pretrained", str(tmp_path / "32.safetensors"), "--smaller", str(tmp_path / "20.safetensors"))
    short = "--optimization.steps=52 --data.held-out=20 --batch.images=16 --batch.micro=16 --saving.every-steps=1"
    given = (*folders, *weights, "--results", str(tmp_path / "found.json"), "--only", row)
    script = REPOSITORY / "benchmarks" / "studies" / "depth_cifar10.py"
    done = finish([sys.executable, str(script), *given, f"--options={short} --log-steps=1 --threads=1"])
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())[row]
    assert found["points"][0]["time"] > 0
    assert [line["point"] for line in found["before"]] == [line["point"] for line in found["points"]]


def studied(name: str, *given: str) -> Any:
    """What a study's last line says."""
    done = finish([sys.executable, str(REPOSITORY / "benchmarks" / "studies" / f"{name}.py"), *given])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_private_statistics_of_every_width_are_more_than_all_weights() -> None:
    """Section 3.2: O(n²). MobileNetV1's at every number of channels, counted by hand: no width changes the stem's."""
    found = {(one["network"], one["divisor"]): one for one in studied("private_statistics")}
    layers = (64, 64, 128, 128, 128, 128, 256, 256, 256, 256, *(512,) * 12, 1024, 1024, 1024)
    shared = (32, 32)  # the stem and the first depthwise convolution
    own = 2 * (sum(shared) + sum(k for n in layers for k in range(n // 4, n + 1)))
    assert found["v1", 1]["private"] == own > found["v1", 1]["weights"]
    assert found["v1", 1]["us_net"] == 2 * (sum(shared) + sum(n + n // 4 for n in layers))
    assert found["v2", 1]["private"] > found["v2", 1]["weights"]


@pytest.mark.soak
def test_residual_errors_of_a_run_fall_with_the_share_of_inputs(tmp_path: Path) -> None:
    found = studied("residual_error", str(train_tiny(tmp_path)), "--images", "16")
    (run,) = found["runs"]
    assert run["layers"] == 35, "17 projections, 16 expansions, the head and the classifier"
    assert run["errors"] == sorted(run["errors"], reverse=True)
    assert 0 < run["falls"] < 1


@pytest.mark.soak
def test_higher_thresholds_of_gates_close_blocks(tmp_path: Path) -> None:
    data = tiny_cifar(tmp_path / "data")
    short = ("--optimization.steps", "2", "--batch.images", "16", "--batch.micro", "16", "--recipe.network.depth", "20")
    asked = ("--data.root", str(data), "--data.held-out", "0", "--runs", str(tmp_path / "runs"), *short)
    assert (
        finish(
            command(*asked, "--recipe.open-rate", "0.9", "--recipe.learning", "sp", recipe="skipnet_cifar10")
        ).returncode
        == 0
    )
    (run,) = studied("gate_thresholds", str(only_run(tmp_path / "runs")))
    blocks = [one["blocks"] for one in run["points"]]
    assert blocks == sorted(blocks, reverse=True)
    assert blocks[0] > 8
    assert blocks[-1] < 2


@pytest.mark.soak
@pytest.mark.parametrize("name", SHORTLY)
def test_benchmark_ends_with_a_line_of_json(name: str, image_folder: Path, tmp_path: Path) -> None:
    root = ("--root", str(image_folder)) if name == "loading" else ()
    given = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *SHORTLY[name], *root]
    done = subprocess.run(given, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
