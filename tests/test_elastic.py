"""Another number of ranks goes on with the same training."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.data import Feed, open_dataset
from pliant.engine.batchnorm import mean_over_ranks
from pliant.engine.ranks import Ranks
from pliant.errors import EXIT_INTERRUPTED
from pliant.experiment import Batching, Data
from pliant.randomness import Draw
from tests.faults import RECIPE
from tests.runs import Launch, arguments, final_state, logged, losses, only_run, tiny_cifar

STEPS, MICRO_BATCHES = 50, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cifar(tmp_path_factory.mktemp("data"))


@settings(max_examples=15)
@given(
    ranks=st.integers(1, 4),
    micro_batches=st.integers(4, 9),
    first=st.integers(0, 40),
    seed=st.integers(0, 2**63 - 1),
)
def test_micro_batch_is_the_same_whoever_runs_it(
    data: Path, ranks: int, micro_batches: int, first: int, seed: int
) -> None:
    """Samples, crops and mirroring, what a method draws, gates per image, and dropout."""

    def seen(rank: int, count: int) -> dict[tuple[int, int], list[torch.Tensor]]:
        dataset = open_dataset(Data(source="cifar10", root=data), seed)
        batching = Batching(images=4 * micro_batches, micro=4)
        feed = Feed(dataset, Data(source="cifar10", root=data), batching, seed=seed, device="cpu")
        indices = Ranks(rank, count, torch.device("cpu")).micro_batches(micro_batches)
        found = {}
        with feed.training(stage=1, first_step=first, last_step=first + 2, micro_batches=indices) as batches:
            for step in (first, first + 1):
                for index in indices:
                    batch, draw = next(batches), Draw(seed, 1, step, index)
                    torch.manual_seed(draw.torch_seed("dropout"))
                    found[step, index] = [
                        batch.positions,
                        batch.images,
                        torch.tensor(draw.uniform(0.35, 1.0, 3)),
                        torch.rand(4, 5, generator=draw.generator(purpose="gates")),
                        torch.nn.functional.dropout(torch.ones(8, 8), 0.5),
                    ]
        return found

    alone = seen(0, 1)
    shared: dict[tuple[int, int], list[torch.Tensor]] = {}
    for rank in range(ranks):
        shared |= seen(rank, ranks)
    assert shared.keys() == alone.keys()
    for place, values in alone.items():
        for one, other in zip(values, shared[place], strict=True):
            assert torch.equal(one, other), place


def start(data: Path, runs: Path, ranks: int) -> Launch:
    """In fp64 and slowly: at a faster rate a difference grows with every step (tests/test_launch.py)."""
    given = arguments(
        data,
        runs,
        precision="fp64",
        optimization__steps=STEPS,
        optimization__lr=5e-5,
        batch__images=16,
        batch__micro=4,
        recipe__n=3,
        evaluate_epochs=0,
    )
    return Launch([sys.executable, RECIPE, *given, "--resume", "auto"], ranks).start()


@pytest.fixture(scope="module")
def one_rank(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("one")
    ((status, said),) = start(data, runs, 1).finish()
    assert status == 0, said
    return only_run(runs)


def assert_same_training(run: Path, other: Path) -> None:
    curve = losses(other)
    assert len(curve) == STEPS
    for got, want in zip(losses(run), curve, strict=True):
        assert got == pytest.approx(want, abs=1e-5)
    assert abs(curve[-1]["1x"] - curve[0]["1x"]) > 1e-4, "it learns"
    mine, theirs = final_state(run), final_state(other)
    for name, tensor in mine["net"].items():
        if not name.rsplit(".", 1)[-1].startswith(("mean", "var")):  # each rank moves its own: their mean counts
            close(tensor, theirs["net"][name], name)
    means = [mean_over_ranks(state["rows"], MICRO_BATCHES) for state in (mine, theirs)]
    close(means[0], means[1], "running statistics")


def close(mine: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.soak
def test_three_ranks_share_four_micro_batches_and_train_the_same(data: Path, one_rank: Path, tmp_path: Path) -> None:
    for status, said in start(data, tmp_path, 3).finish():
        assert status == 0, said
    assert_same_training(only_run(tmp_path), one_rank)


def test_four_ranks_then_two_then_one_train_the_same(data: Path, one_rank: Path, tmp_path: Path) -> None:
    for ranks, until in ((4, 12), (2, 25), (1, STEPS)):
        launch = start(data, tmp_path, ranks)
        if until < STEPS:
            while launch.running() and (
                not list(tmp_path.glob("*/*/log.jsonl")) or len(losses(only_run(tmp_path))) < until
            ):
                time.sleep(0.01)
            launch.processes[-1].send_signal(signal.SIGTERM)
        for status, said in launch.finish():
            assert status == (EXIT_INTERRUPTED if until < STEPS else 0), said
    starts = logged(only_run(tmp_path), "start")
    assert [line["ranks"] for line in starts] == [4, 2, 1]
    assert 0 < starts[1]["step"] < starts[2]["step"]
    assert_same_training(only_run(tmp_path), one_rank)
