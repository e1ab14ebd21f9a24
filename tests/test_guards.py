"""What watches over a run: verified gradients, the layer that is not finite, agreed stops, ranks that do not answer."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pliant.engine import folder
from pliant.engine import ranks as ranks_module
from pliant.engine.agreement import heeded
from pliant.engine.backends import wrap
from pliant.engine.batchnorm import RunningStatistics
from pliant.engine.diagnosis import watching
from pliant.engine.folder import RunFolder
from pliant.engine.interruption import Interruption, Stopped, listening
from pliant.engine.meter import Meter
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks, joined
from pliant.engine.schedule import make_schedule
from pliant.engine.session import _agreed
from pliant.engine.step import accumulate
from pliant.engine.verification import verify
from pliant.errors import EXIT_INTERRUPTED, EXIT_RANKS_LOST, EXIT_USER_ERROR, Interrupted, UserError
from pliant.experiment import Batching, Optimization
from pliant.randomness import Draw
from pliant.recipe import Stage
from recipes.usnet_cifar10 import EXPERIMENT
from tests.faults import PLIANT, RECIPE
from tests.runs import Launch, arguments, command, finish, listens, only_run, tiny_cifar
from tests.test_ranks import spawn
from tests.truth import Touches, batch_of, progress_at

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cifar(tmp_path_factory.mktemp("data"))


def wait_until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 60
        time.sleep(0.01)


def _verified(ranks: Ranks) -> None:
    recipe, total = Touches(), 2 * ranks.count
    for precision in ("fp32", "bf16", "fp16"):
        torch.manual_seed(0)
        net, kind = recipe.build(5), Precision(precision, ranks.device)
        backend = wrap(net, ranks, "ddp", Optimization(), kind)
        indices = ranks.micro_batches(total)
        batches = [batch_of(3, index) for index in indices]
        draws = [Draw(0, 0, 3, index) for index in indices]
        before = {name: value.clone() for name, value in net.state_dict().items()}
        accumulate(recipe, net, backend, RunningStatistics(net), batches, draws, progress_at(3), total)
        verify(recipe, backend, kind, ranks, batches, 0, progress_at(3), total)
        torch.testing.assert_close(net.state_dict(), before, atol=0, rtol=0)
        net.earlier.weight.grad *= 1.5
        with pytest.raises(UserError, match=r"gradient of earlier.weight is 0.5 times its norm off .*step 3"):
            verify(recipe, backend, kind, ranks, batches, 0, progress_at(3), total)


def test_reduced_gradient_is_verified_and_a_wrong_parameter_named() -> None:
    spawn(_verified, 2)


def test_layer_that_is_not_finite_first_is_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with watching(net) as finding:
        net(torch.ones(2, 3)).sum().backward()
    assert "every layer's output" in str(finding)
    with torch.no_grad():
        net[0].bias[1] = torch.inf
    with watching(net) as finding:
        net(torch.ones(2, 3)).sum().backward()
    assert str(finding).startswith("the output of 0 was the first")
    with torch.no_grad():
        net[0].bias[1] = 0.0
    with watching(net) as finding:
        (net(torch.ones(2, 3)).sum() * torch.inf).backward()
    assert str(finding).startswith("the gradient at the output of 2 was the first")


def test_run_whose_loss_is_not_finite_ends_with_the_layer(data: Path, tmp_path: Path) -> None:
    """At the same step however often it saves: what a step came to is read then, and not once more."""
    ended = []
    for save in (100, 5):
        runs = tmp_path / str(save)
        given = arguments(data, runs, optimization__steps=60, optimization__lr=1e18, saving__every_steps=save)
        done = finish(command(*given))
        assert done.returncode == EXIT_USER_ERROR
        ended += re.findall(r"not finite in 20 steps in a row, up to step (\d+);", done.stderr)
        assert "was the first that is not finite" in done.stderr
        assert "Traceback" not in done.stderr
    assert len(ended) == 2 and ended[0] == ended[1]


def _agree(ranks: Ranks) -> None:
    """Rank 1 has fewer items, and is the one that is asked to stop."""
    interruption, taken = Interruption(), []
    items = range(10) if ranks.first else range(4)

    def take() -> None:
        for item in heeded(items, 10, ranks, interruption):
            taken.append(item)
            interruption.asked = ranks.rank == 1 and item == 3

    with pytest.raises(Stopped):
        take()
    assert len(taken) in ((5, 6) if ranks.first else (4,))
    calm = Interruption()
    assert list(heeded(items, 10, ranks, calm)) == list(items)


def test_ranks_with_unlike_numbers_of_batches_stop_together() -> None:
    spawn(_agree, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR2, marks=pytest.mark.soak)])
def test_signal_to_one_rank_stops_both_with_a_checkpoint(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    given = arguments(data, tmp_path, optimization__steps=2000, evaluate_epochs=0.5)
    launch = Launch([sys.executable, RECIPE, *given]).start()
    for line in launch.processes[0].stdout:
        if line.startswith("step 7/"):
            break
    launch.processes[1].send_signal(number)
    (first, said), (second, _) = launch.finish()
    assert (first, second) == (EXIT_INTERRUPTED, EXIT_INTERRUPTED), said
    assert "Stopped after step" in said
    assert list(only_run(tmp_path).glob("checkpoints/step-*"))
    # Asked for a spectrum, both stop between two batches as well.
    launch = Launch([PLIANT, "spectrum", str(only_run(tmp_path)), "--at", "0.35:0.01:1.0"]).start()
    wait_until(lambda: all(listens(process.pid) for process in launch.processes))
    launch.processes[1].send_signal(signal.SIGINT)
    for status, said in launch.finish():
        assert status == EXIT_INTERRUPTED, said
        assert "Traceback" not in said
    assert not (only_run(tmp_path) / "spectrum.json").exists()


def test_rank_that_hangs_is_given_up_and_says_where_it_stood(data: Path, tmp_path: Path) -> None:
    given = arguments(data, tmp_path, optimization__steps=2000, timeout_minutes=0.1)
    launch = Launch([sys.executable, RECIPE, *given]).start()
    for line in launch.processes[0].stdout:
        if line.startswith("step 3/"):
            break
    launch.processes[1].send_signal(signal.SIGSTOP)  # it hangs, as on a broken disk
    started = time.monotonic()
    said = launch.processes[0].communicate(timeout=60)[1]
    assert launch.processes[0].returncode == EXIT_RANKS_LOST, said
    assert time.monotonic() - started < 30
    assert "Rank 0 waited in vain for another" in said
    assert "Traceback" not in said
    launch.processes[1].send_signal(signal.SIGCONT)
    launch.processes[1].communicate(timeout=60)
    stood = "".join(path.read_text() for path in (only_run(tmp_path) / "hangs").glob("rank-*.txt"))
    assert "most recent call first" in stood
    assert "trainer.py" in stood


def _slowest(ranks: Ranks) -> None:
    config = Optimization(steps=10)
    meter = Meter(make_schedule((Stage(),), config, [10]), ranks, Batching(images=16, micro=8))
    recipe = Touches()
    net = recipe.build(5)
    backend = wrap(net, ranks, "ddp", config, Precision("fp32", ranks.device))
    for step in range(3):
        taken = meter.timed(iter([batch_of(step, ranks.rank)]), 1)
        time.sleep(0.05 + 0.1 * ranks.rank)
        draws = [Draw(0, 0, step, ranks.rank)]
        statistics = RunningStatistics(net)
        losses = accumulate(
            recipe, net, backend, statistics, taken, draws, progress_at(step), ranks.count, meter.reducing
        )
        done = backend.update(0.1)
        meter.add(losses)
    window = meter.window(3, 0, progress_at(2), 0.1, done)
    rank, times = window.slowest
    assert rank == 1
    assert times > 1.2
    assert 0.04 < window.rank_seconds[0] < window.rank_seconds[1]
    assert "slowest rank 1" in window.line()


def test_slowest_rank_is_named() -> None:
    spawn(_slowest, 2)


def test_signals_in_a_measurement_are_listened_to() -> None:
    with listening() as interruption:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.asked
        with pytest.raises(Stopped):
            list(heeded(range(3), 3, ALONE, interruption))


@pytest.mark.parametrize(
    ("device", "raised", "closed"),
    [
        ("cuda", None, True),
        ("cuda", Interrupted("stopped"), True),
        ("cuda", ValueError("alone"), False),
        ("cpu", ValueError("alone"), True),
    ],
)
def test_nccl_s_group_is_left_open_by_a_rank_that_fails_alone(
    device: str, raised: Exception | None, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing it is collective there: it would wait for ranks that wait for this one."""
    left: list[bool] = []
    monkeypatch.setattr(ranks_module, "join", lambda _: Ranks(0, 2, torch.device(device)))
    monkeypatch.setattr(ranks_module, "leave", lambda: left.append(True))
    with contextlib.suppress(ValueError, Interrupted), joined():
        if raised is not None:
            raise raised
    assert left == [True] * closed


ABANDONS = """
import atexit, torch.distributed as dist
from pliant.guard import guarded
from pliant.engine import ranks
from pliant.errors import UserError
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
atexit.register(print, "the interpreter came to its end")
def fails():
    raise {error}
guarded(fails)
"""


@pytest.mark.parametrize(("error", "status"), [("UserError('a mistake')", 2), ("RuntimeError('a defect')", 1)])
def test_process_whose_group_is_left_open_ends_at_once(error: str, status: int) -> None:
    done = finish([sys.executable, "-c", ABANDONS.format(error=error)])
    assert done.returncode == status
    assert error.split("'")[1] in done.stderr
    assert "the interpreter came to its end" not in done.stdout


def test_rows_of_a_network_without_running_statistics_are_exchanged_with_nobody() -> None:
    assert Ranks(1, 3, torch.device("cpu")).rows(torch.empty(0)).shape == (3, 0)


def _finds_no_room(ranks: Ranks, disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        _agreed(ranks, lambda: folder.keep_changes(EXPERIMENT, RunFolder(disk)))


def test_full_disk_of_the_first_rank_ends_the_others_too(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(2**20))
    spawn(_finds_no_room, 2, small_disk)
