"""Stopped anywhere and resumed, a run ends with the weights of the run that was not stopped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pliant.engine import checkpoint
from pliant.engine.folder import alone_in
from pliant.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from tests.runs import (
    arguments,
    begun_at,
    command,
    environment,
    final_state,
    finish,
    logged,
    losses,
    only_run,
    same,
    tiny_cifar,
)

SETTINGS = {"saving__every-steps": 3, "evaluate-epochs": 1, "optimization__ema": 0.9}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cifar(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("whole")
    done = finish(command(*arguments(data, runs, **SETTINGS)))
    assert done.returncode == 0, done.stderr
    return only_run(runs)


def start(given: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(given, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    """Reads lines until one begins with the text."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(text):
            return
    raise AssertionError(f"{text!r} never came: {process.stderr.read() if process.stderr else ''}")


def equal(run: Path, other: Path) -> bool:
    """Weights, running statistics, averages and optimizer, bit for bit."""
    one, two = final_state(run), final_state(other)
    return all(same(one[name], two[name]) for name in ("net", "rows", "ema", "ema_rows", "optimizer", "precision"))


@pytest.mark.parametrize("step", [1, 4, pytest.param(8, marks=pytest.mark.soak)])
def test_killed_and_resumed_ends_the_same(data: Path, undisturbed: Path, tmp_path: Path, step: int) -> None:
    """Before the first checkpoint, in the middle of an epoch, and in a later one."""
    given = command(*arguments(data, tmp_path, **SETTINGS))
    process = start(given)
    wait_for(process, f"step {step}/12")
    process.kill()
    process.communicate()
    done = finish([*given, "--resume", "auto"])
    assert done.returncode == 0, done.stderr
    runs = sorted(path for path in tmp_path.glob("*/*") if (path / "checkpoints").is_dir())
    assert equal(runs[-1], undisturbed)
    if len(list(tmp_path.glob("*/*"))) == 1:
        assert losses(runs[0]) == losses(undisturbed)
        assert begun_at(runs[0])[-1] >= 3, "not from the start"
    else:
        assert step < 8, "there was a checkpoint to go on from"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak), signal.SIGUSR1]
)
def test_signal_stops_after_the_step_with_a_checkpoint(
    data: Path, undisturbed: Path, tmp_path: Path, number: signal.Signals
) -> None:
    given = command(*arguments(data, tmp_path, **SETTINGS))
    process = start(given)
    wait_for(process, "step 5/12")
    process.send_signal(number)
    said, complaints = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, complaints
    assert "Traceback" not in complaints
    (again,) = re.findall("^Go on with: (.*)$", said, re.MULTILINE)
    assert again.endswith(f"--resume {only_run(tmp_path)}")
    done = finish(shlex.split(again))
    assert done.returncode == 0, done.stderr
    assert equal(only_run(tmp_path), undisturbed)
    assert losses(only_run(tmp_path)) == losses(undisturbed)
    assert [line["step"] for line in logged(only_run(tmp_path), "step")] == list(range(1, 13)), "none is taken again"
    assert begun_at(only_run(tmp_path))[-1] >= 5


def test_resuming_waits_for_the_run_s_last_step(data: Path, tmp_path: Path) -> None:
    """After Ctrl-C some launchers give the prompt back before it is done, and its checkpoint written."""
    given = command(*arguments(data, tmp_path, **SETTINGS | {"optimization.steps": 5000}))
    process = start(given)
    wait_for(process, "step 4/5000")
    run = only_run(tmp_path)
    while checkpoint.newest(run.joinpath("checkpoints")) is None:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    hasty = start([*given, "--resume", str(run)])
    wait_for(hasty, f"Another process is training in {run}: waiting")
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    _, complaints = process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED, complaints
    wait_for(hasty, "run folder")
    hasty.send_signal(signal.SIGTERM)
    hasty.communicate(timeout=60)
    assert len(begun_at(run)) == 2
    steps = [line["step"] for line in logged(run, "step")]
    assert steps == list(range(1, len(steps) + 1)), "it goes on where the other one ended"


def test_run_that_trains_on_is_refused_to_others(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        code = (
            "from pathlib import Path; from pliant.engine.folder import alone_in; alone_in(Path(PATH), 0.1).__enter__()"
        )
        done = finish([sys.executable, "-c", code.replace("PATH", repr(str(tmp_path)))])
    assert f"Another process is training in {tmp_path}: stop it first" in done.stderr


def test_second_ctrl_c_leaves_at_once(data: Path, tmp_path: Path) -> None:
    """In the middle of a step that never ends by itself."""
    slow = arguments(data, tmp_path, batch__images=40000, batch__micro=8, data__tail="wrap")
    process = start(command(*slow))
    wait_for(process, "run folder")
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, complaints = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Left at once" in complaints


def test_damaged_checkpoint_is_named_and_the_one_before_it_used(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    given = command(*arguments(data, tmp_path, **SETTINGS))
    process = start(given)
    wait_for(process, "step 8/12")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    run = only_run(tmp_path)
    before, newest = sorted((run / "checkpoints").iterdir())[-2:]
    state = bytearray((newest / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (newest / "state.pt").write_bytes(state)
    done = finish([*given, "--resume", "auto"])
    assert done.returncode == 0, done.stderr
    assert str(newest / "state.pt") in done.stdout
    assert begun_at(run) == [0, int(before.name.removeprefix("step-"))]
    assert equal(run, undisturbed)


def test_run_without_a_whole_checkpoint_is_not_begun_anew_in_its_folder(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(undisturbed, tmp_path / undisturbed.parent.name / undisturbed.name)
    for path in (run / "checkpoints").iterdir():
        (path / "state.pt").write_bytes(b"torn")
    before = (run / "log.jsonl").read_bytes()
    for where in ("auto", str(run)):
        done = finish(command(*arguments(data, tmp_path, **SETTINGS), "--resume", where))
        assert done.returncode == EXIT_USER_ERROR
        assert f"{run} holds no whole checkpoint to go on with" in done.stderr
        assert "state.pt is damaged" in done.stderr
        assert "Traceback" not in done.stderr
    assert (run / "log.jsonl").read_bytes() == before


def test_checkpoint_of_another_network_is_refused(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The settings are the same, but the code that builds the network is not."""
    run = shutil.copytree(undisturbed, tmp_path / undisturbed.parent.name / undisturbed.name)
    recipe = command()[1]
    change = "build = USNet.build\nUSNet.build = lambda self, classes: build(self, classes + 1)\n"
    text = Path(recipe).read_text().replace("if __name__", f"{change}\nif __name__")
    other = tmp_path / "usnet_cifar10.py"
    other.write_text(text)
    done = finish([sys.executable, str(other), *arguments(data, tmp_path, **SETTINGS), "--resume", str(run)])
    assert done.returncode == EXIT_USER_ERROR
    assert f"{run} holds another network" in done.stderr
    assert "Traceback" not in done.stderr


def test_finished_run_is_left_as_it_is(data: Path, undisturbed: Path) -> None:
    before = final_state(undisturbed)
    done = finish(command(*arguments(data, undisturbed.parents[1], **SETTINGS), "--resume", str(undisturbed)))
    assert done.returncode == 0, done.stderr
    assert same(final_state(undisturbed), before)


def test_fixed_setting_that_differs_is_refused_and_listed(data: Path, undisturbed: Path) -> None:
    changed = SETTINGS | {"batch__micro": 16, "optimization__lr": 0.3}
    done = finish(command(*arguments(data, undisturbed.parents[1], **changed), "--resume", str(undisturbed)))
    assert done.returncode == EXIT_USER_ERROR
    assert "batch.micro was 8 and is 16" in done.stderr
    assert "optimization.lr was 0.1 and is 0.3" in done.stderr
    assert "Traceback" not in done.stderr


def test_other_training_images_are_refused(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The same files elsewhere are the same images; one image of another class is another dataset."""
    moved = shutil.copytree(data, tmp_path / "moved")
    given = command(*arguments(moved, undisturbed.parents[1], **SETTINGS), "--resume", str(undisturbed))
    done = finish(given)
    assert done.returncode == 0, done.stderr
    file = moved / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = bytearray(file.read_bytes())
    content[0] = (content[0] + 1) % 10
    file.write_bytes(content)
    done = finish(given)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: The training images are others than when {undisturbed} was begun, as many (200), but of other "
        "classes: write --data.root with the old ones, or leave --resume out."
    )


def test_full_disk_is_one_sentence_and_loses_nothing(data: Path, tmp_path: Path) -> None:
    """The run folder lies on a small tmpfs that the first checkpoint fits and the others do not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], check=False).returncode
    ):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        done = finish(command(*arguments(data, disk, **SETTINGS)))
        checkpoints = only_run(disk) / "checkpoints"
        kept = sorted(path.name for path in checkpoints.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # a busy machine may still be looking at it
    assert done.returncode == EXIT_USER_ERROR, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "No space left on device" in done.stderr, done.stderr
    assert "the run goes on" in done.stdout, done.stdout
    assert kept
    assert all(name.startswith("step-") and "." not in name for name in kept)
