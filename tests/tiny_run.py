"""A run small enough to be trained inside a test, by the command line itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from pliant import cli
from tests.runs import tiny_cifar

TEST_IMAGES = 40
MICRO = 16
RECIPE = """
from pathlib import Path
from pliant.experiment import Batching, Calibration, Data, Experiment, Optimization
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet

EXPERIMENT = Experiment(
    name="tiny",
    recipe=USNet(network=MobileNet(full=0.25, divisor=4), low=0.5, n=3, grid=0.25),
    data=Data(source="cifar10", root=Path({root!r})),
    batch=Batching(images=32, micro={micro}),
    optimization=Optimization(lr=0.1, steps=2),
    calibration=Calibration(images=64, batch=32),
    runs=Path({runs!r}),
)
"""


def write_recipe(folder: Path) -> Path:
    """A recipe file whose data lies in `folder`/data and whose runs will lie in `folder`/runs."""
    path = folder / "tiny.py"
    path.write_text(RECIPE.format(root=str(folder / "data"), runs=str(folder / "runs"), micro=MICRO))
    return path


def train_tiny(folder: Path) -> Path:
    """The folder of a run of two steps."""
    tiny_cifar(folder / "data", TEST_IMAGES)
    cli.main(["train", str(write_recipe(folder))])
    (run,) = (folder / "runs" / "tiny").iterdir()
    return run


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `pliant` says of a mistake: exit status 2 and a sentence, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip()
    assert caught.value.code == 2
    assert said.startswith("error: ")
    assert said.endswith(".")
    assert "\n" not in said
    return said.removeprefix("error: ")
