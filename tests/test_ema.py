"""The average of the weights: what it is after each step, and that it is what a run is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from pliant import cli
from pliant.engine import checkpoint
from pliant.engine.ranks import Ranks
from pliant.engine.trained import open_run
from tests.runs import REPOSITORY, logged, only_run, tiny_cifar

STEPS, DECAY = 14, 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a plain network with an average of its weights, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("ema")
    tiny_cifar(folder / "data")
    options = {
        "--data.root": folder / "data",
        "--runs": folder / "runs",
        "--recipe.network.depth": 8,
        "--batch.images": 32,
        "--batch.micro": 32,
        "--optimization.steps": STEPS,
        "--optimization.warmup-epochs": 0,
        "--optimization.ema": DECAY,
        "--saving.every-steps": 1,
        "--saving.keep": STEPS,
        "--evaluate-epochs": 0,
        "--threads": 1,
    }
    given = [str(text) for pair in options.items() for text in pair]
    cli.main(["train", str(REPOSITORY / "recipes" / "resnet_cifar10.py"), *given])
    return only_run(folder / "runs")


def test_average_forgets_the_random_weights_first_and_then_decays_as_asked(run: Path) -> None:
    """With the decay asked for from the start, a short run's average would be the weights it began with."""
    average: dict[str, torch.Tensor] = {}
    for step in range(1, STEPS + 1):
        state = checkpoint.require(run / "checkpoints", str(step)).load()
        decay = min(DECAY, (step - 1) / (step + 9))
        for name, average_now in state["ema"].items():
            if average_now.is_floating_point():
                before = average.get(name, torch.zeros_like(average_now))
                expected = decay * before + (1 - decay) * state["net"][name]
                torch.testing.assert_close(average_now, expected, msg=lambda text, n=name, s=step: f"{n}, {s}: {text}")
        average = state["ema"]
    assert decay == DECAY


def test_average_is_validated_and_asked_in_the_weights_place(run: Path) -> None:
    trained = open_run(run, Ranks(0, 1, torch.device("cpu")))
    state = checkpoint.require(run / "checkpoints", "newest").load()
    for name, parameter in trained.net.named_parameters():
        assert torch.equal(parameter, state["ema"][name])
        assert not torch.equal(parameter, state["net"][name])
    with torch.no_grad(), trained.feed.evaluation("val", batch=40) as batches:
        (batch,) = batches
        logits = trained.net(batch.images)
    (line,) = logged(run, "val")[-1]["lines"]
    assert line["loss"] == pytest.approx(cross_entropy(logits, batch.labels).item(), rel=1e-4)
    assert line["top1"] == pytest.approx((logits.argmax(1) == batch.labels).float().mean().item())
