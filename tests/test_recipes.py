"""The ImageNet recipes: the paper's settings, a helpful sentence without data, and steps on real photographs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pliant import record
from pliant.errors import EXIT_USER_ERROR
from pliant.methods.us_net import USNet
from tests.runs import REPOSITORY, command, finish, losses, only_run

WIDTH = ("usnet_mbv1", "usnet_mbv2", "snet_mbv2", "inet_mbv2")
DEPTH = ("skipnet_resnet101", "blockdrop_resnet101", "urnet_resnet101")


@pytest.mark.parametrize("name", (*WIDTH, *DEPTH))
def test_without_a_data_root_the_recipe_says_what_to_write(name: str, tmp_path: Path) -> None:
    done = finish(command("--runs", str(tmp_path), recipe=name))
    assert done.returncode == EXIT_USER_ERROR
    assert "--data.root" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", (*WIDTH, *DEPTH))
def test_recipe_runs_on_the_photographs(name: str, shared_data: Path, tmp_path: Path) -> None:
    """Three steps at 224 px here, or of a ResNet-18 at 64 where the recipe has 101 layers; `make soak` takes twenty of
    all."""
    shallow = ("--recipe.network.depth", "18", "--data.size", "64") if name in DEPTH else ()
    _run_on_photographs(name, shared_data, tmp_path, 3, *shallow)


@pytest.mark.soak
@pytest.mark.parametrize("name", (*WIDTH, *DEPTH))
def test_recipe_runs_twenty_steps_on_the_photographs(name: str, shared_data: Path, tmp_path: Path) -> None:
    _run_on_photographs(name, shared_data, tmp_path, 20)


def _run_on_photographs(name: str, shared_data: Path, tmp_path: Path, steps: int, *more: str) -> None:
    given = ["--data.root", str(shared_data / "photos"), "--data.classes", "1000", "--runs", str(tmp_path)]
    given += ["--data.held-out", "0"]
    given += [
        "--batch.images",
        "8",
        "--batch.micro",
        "4",
        "--optimization.steps",
        str(steps),
        "--log-steps",
        "1",
        "--optimization.lr",
        "0.01",
    ]
    done = finish(command(*given, *more, recipe=name))
    assert done.returncode == 0, done.stderr
    lines = losses(only_run(tmp_path))
    assert len(lines) == steps
    signed = name in DEPTH  # a policy's loss may be negative
    assert all(math.isfinite(loss) and (signed or 0 < loss < 20) for line in lines for loss in line.values())


@pytest.mark.parametrize(("name", "low"), [("usnet_mbv1", 0.25), ("usnet_mbv2", 0.35)])
def test_us_nets_carry_the_paper_s_settings(name: str, low: float) -> None:
    """Section 5.1, and the authors' code where it is silent."""
    experiment = record.load_recipe_file(REPOSITORY / "recipes" / f"{name}.py").EXPERIMENT
    recipe, optimization, data = experiment.recipe, experiment.optimization, experiment.data
    assert isinstance(recipe, USNet)
    assert (recipe.low, recipe.high, recipe.n, recipe.rule, recipe.distill) == (low, 1.0, 4, "sandwich", True)
    assert (optimization.lr, optimization.schedule, optimization.epochs) == (0.5, "linear", 250)
    assert (optimization.momentum, optimization.nesterov, optimization.weight_decay) == (0.9, True, 1e-4)
    assert optimization.decay == "kernels"
    assert (experiment.batch.images, experiment.batch.micro, data.size) == (1024, 128, 224)
    assert (data.scale, data.jitter, data.lighting) == ((0.25, 1.0), 0.4, 0.1)
    assert len(recipe.points()) == round((1.0 - low) / 0.025) + 1
