"""Two ranks, started the ways a user starts them, train to the losses of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pliant.errors import EXIT_USER_ERROR
from tests.runs import REPOSITORY, arguments, command, environment, finish, losses, only_run, tiny_cifar

BIN = Path(sys.executable).parent
RECIPE = str(REPOSITORY / "recipes" / "usnet_cifar10.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cifar(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    runs = tmp_path_factory.mktemp("one")
    done = finish(command(*settings(data, runs)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 rank on cpu")
    return losses(only_run(runs))


def settings(data: Path, runs: Path) -> list[str]:
    """In fp64 and slowly: training is chaotic. At the recipe's own rate two runs of one process that begin 1e-12 apart
    are 1e-3 apart after six steps, so a sum taken in another order would show whatever the gradients are."""
    return arguments(data, runs, precision="fp64", optimization__steps=20, optimization__lr=0.003)


LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2"],
    "accelerate launch": [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_train_to_the_losses_of_one_process(
    data: Path, one_process: list[dict[str, float]], tmp_path: Path, launcher: str
) -> None:
    port = ["--main_process_port", "0"] if launcher == "accelerate launch" else []
    done = finish([*LAUNCHERS[launcher], *port, RECIPE, *settings(data, tmp_path), "--ranks", "2"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks on cpu")
    several = losses(only_run(tmp_path))
    assert len(several) == len(one_process) == 20
    for got, want in zip(several, one_process, strict=True):
        assert got == pytest.approx(want, abs=1e-5)


def test_number_of_ranks_is_held_to(data: Path, tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; --ranks 2 sees to it."""
    given = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    done = finish([*given, RECIPE, *settings(data, tmp_path), "--ranks", "2"])
    assert done.returncode != 0
    assert "--ranks 2 was asked for and 1 take part" in done.stderr
    assert not list(tmp_path.iterdir())


def test_processes_that_would_each_train_alone_are_refused(data: Path, tmp_path: Path) -> None:
    """Two tasks of one srun without a rendezvous would both write the whole run."""
    done = subprocess.run(
        command(*settings(data, tmp_path)),
        env={**environment(), "SLURM_STEP_NUM_TASKS": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_USER_ERROR
    assert "without WORLD_SIZE and RANK" in done.stderr
    assert not list(tmp_path.iterdir())
