"""Two ranks, started the ways a user starts them, train to the losses of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pliant.errors import EXIT_USER_ERROR
from tests.runs import REPOSITORY, arguments, command, environment, finish, logged, losses, only_run, tiny_cifar

BIN = Path(sys.executable).parent
RECIPE = str(REPOSITORY / "recipes" / "usnet_cifar10.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cifar(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("one")
    done = finish(command(*settings(data, runs)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 rank on cpu")
    return only_run(runs)


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
    data: Path, one_process: Path, tmp_path: Path, launcher: str
) -> None:
    port = ["--main_process_port", "0"] if launcher == "accelerate launch" else []
    done = finish([*LAUNCHERS[launcher], *port, RECIPE, *settings(data, tmp_path), "--ranks", "2"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ranks on cpu")
    several, alone = losses(only_run(tmp_path)), losses(one_process)
    assert len(several) == len(alone) == 20
    for got, want in zip(several, alone, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    measured, expected = (logged(run, "val") for run in (only_run(tmp_path), one_process))
    assert expected and len(measured) == len(expected)
    for got, want in zip(measured, expected, strict=True):
        assert got["step"] == want["step"]
        for mine, theirs in zip(got["lines"], want["lines"], strict=True):
            assert mine["images"] == theirs["images"]
            assert mine["top1"] == pytest.approx(theirs["top1"])
            assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_number_of_ranks_is_held_to(data: Path, tmp_path: Path) -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; --ranks 2 sees to it."""
    given = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    done = finish([*given, RECIPE, *settings(data, tmp_path), "--ranks", "2"])
    assert done.returncode != 0
    assert "--ranks 2 was asked for and 1 take part" in done.stderr
    assert not list(tmp_path.iterdir())


def test_processes_that_would_each_train_alone_are_refused(data: Path, tmp_path: Path) -> None:
    """Two processes of one mpirun without a rendezvous would both write the whole run."""
    done = subprocess.run(
        command(*settings(data, tmp_path)),
        env={**environment(), "OMPI_COMM_WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == EXIT_USER_ERROR
    assert "without WORLD_SIZE and RANK" in done.stderr
    assert not list(tmp_path.iterdir())


def test_tasks_of_srun_find_each_other(data: Path, one_process: Path, tmp_path: Path) -> None:
    """With what srun sets and nothing else."""
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    job |= {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    tasks = [
        subprocess.Popen(
            command(*settings(data, tmp_path), "--ranks", "2"),
            env={**environment(), **job, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in (0, 1)
    ]
    said = [task.communicate(timeout=120) for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert said[0][0].startswith("2 ranks on cpu")
    assert said[1][0] == ""
    for got, want in zip(losses(only_run(tmp_path)), losses(one_process), strict=True):
        assert got == pytest.approx(want, abs=1e-5)


FAST = {
    "optimization__steps": 50,
    "optimization__lr": 2e-5,
    "batch__images": 16,
    "batch__micro": 8,
    "recipe__n": 2,
    "evaluate_epochs": 0,
}
"""fp32, as DeepSpeed has no fp64; at a rate at which a last bit does not grow in fifty steps."""


@pytest.fixture(scope="module")
def two_ranks_of_ddp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    runs = tmp_path_factory.mktemp("ddp")
    done = finish([*LAUNCHERS["torchrun"], RECIPE, *arguments(data, runs, **FAST, ranks=2)])
    assert done.returncode == 0, done.stderr
    return losses(only_run(runs))


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_accelerate_with_a_deepspeed_file_trains_to_the_losses_of_ddp(
    data: Path, two_ranks_of_ddp: list[dict[str, float]], tmp_path: Path, stage: int
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"}))
    launcher = [str(BIN / "accelerate"), "launch", "--use_deepspeed", "--deepspeed_config_file", str(file)]
    given = [*launcher, "--num_processes", "2", "--main_process_port", "0", RECIPE]
    runs = tmp_path / "runs"
    done = subprocess.run(
        [*given, *arguments(data, runs, **FAST, ranks=2)],
        env={**environment(), "ACCELERATE_USE_CPU": "true", "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 ranks on cpu" in done.stdout
    assert f"DeepSpeed ZeRO {stage}" in done.stdout
    several = losses(only_run(runs))
    assert len(several) == len(two_ranks_of_ddp) == 50
    for got, want in zip(several, two_ranks_of_ddp, strict=True):
        assert got == pytest.approx(want, abs=5e-5)
