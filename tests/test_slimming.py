"""`pliant slim`: a trained network's widths chosen group by group."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant import cli
from pliant.engine.slimming import slim
from pliant.engine.trained import open_run
from pliant.errors import UserError
from pliant.experiment import Calibration
from pliant.methods.i_net import INet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from pliant.recipe import Measurement, Width, Widths, parse_point
from tests.runs import only_run, tiny_cifar
from tests.test_step import ALONE
from tests.tiny_run import TEST_IMAGES, refusal, write_recipe

RECIPE = USNet(network=MobileNet(full=0.25, divisor=4), low=0.5)
with torch.device("meta"):
    NET = RECIPE.build(10)


@given(
    ratios=st.lists(st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0]), min_size=24, max_size=24),
    step=st.sampled_from([0.05, 0.1, 0.3, 1.0]),
)
def test_points_below_differ_in_one_group_which_has_fewer_channels(ratios: list[float], step: float) -> None:
    here = NET.channels(tuple(ratios))
    below = RECIPE.narrower(NET, Widths(tuple(ratios)), step)
    for point in below:
        assert isinstance(point, Widths)
        (group,) = (group for group, ratio in enumerate(point.ratios) if ratio != ratios[group])
        there = NET.channels(point.ratios)
        assert there[group] < here[group]
        assert [*there[:group], *there[group + 1 :]] == [*here[:group], *here[group + 1 :]]
        assert RECIPE.admits(point) is None
    narrowest = NET.channels(0.5)
    assert len(below) == sum(one > least for one, least in zip(here, narrowest, strict=True)), "every group that can"


def test_narrowest_network_has_no_points_below() -> None:
    assert RECIPE.narrower(NET, Width(0.5), 0.1) == []


class Ladder:
    """Three places, each with some steps; what a step down in each costs in loss, and saves."""

    LOSS = (0.1, 0.5, 0.3)
    SAVED = (10.0, 100.0, 15.0)  # so a unit costs 0.01, 0.005 and 0.02

    def points(self) -> tuple[Widths, ...]:
        return Widths((0.5, 0.5, 0.5)), Widths((1.0, 1.0, 1.0))

    def parameters_at(self, net: None, point: Widths) -> int:
        return round(100 * sum(point.ratios))

    def narrower(self, net: None, point: Widths, step: float) -> list[Widths]:
        lower = [max(0.5, ratio - step) for ratio in point.ratios]
        ratios = point.ratios
        return [
            Widths((*ratios[:place], lower[place], *ratios[place + 1 :])) for place in range(3) if ratios[place] > 0.5
        ]


def on_the_ladder(macs: float, step: float = 0.25, loss_of: tuple[float, ...] = Ladder.LOSS) -> list[tuple[str, float]]:
    def measure(nets: dict[Widths, None], split: str) -> list[Measurement]:
        lines = []
        for point in nets:
            down = [round((1.0 - ratio) / 0.25) for ratio in point.ratios]
            loss = 1.0 + sum(a * b for a, b in zip(loss_of, down, strict=True))
            cost = 1000.0 - sum(a * b for a, b in zip(Ladder.SAVED, down, strict=True))
            lines.append(Measurement(point=str(point), images=1, top1=0.5, top5=0.5, loss=loss, macs=cost))
        return lines

    trained: Any = SimpleNamespace(
        recipe=Ladder(), net=None, measure=measure, calibrated=lambda points, _: dict.fromkeys(points)
    )
    return [(line.point, line.macs or 0) for line in slim(trained, Calibration(), "val", macs=macs, step=step)]


def test_each_round_goes_where_the_loss_is_least_for_what_is_saved() -> None:
    """Not where it is least: the first place costs least in loss, the second saves most."""
    assert on_the_ladder(785.0) == [
        ("1/1/1x", 1000.0),
        ("1/0.75/1x", 900.0),
        ("1/0.5/1x", 800.0),
        ("0.75/0.5/1x", 790.0),
        ("0.5/0.5/1x", 780.0),
    ]
    assert on_the_ladder(900.0)[-1] == ("1/0.75/1x", 900.0), "no farther than what was asked for"
    assert on_the_ladder(2000.0) == [("1/1/1x", 1000.0)]


def test_where_the_loss_falls_what_falls_most_and_saves_most_comes_first() -> None:
    losses = (-0.02, -0.1, 0.1)  # for what it saves, the first falls by twice as much as the second
    assert [point for point, _ in on_the_ladder(890.0, loss_of=losses)] == ["1/1/1x", "1/0.75/1x", "1/0.5/1x"]


def test_less_than_the_narrowest_network_takes_is_refused_before_any_round() -> None:
    assert on_the_ladder(750.0)[-1] == ("0.5/0.5/0.5x", 750.0)
    with pytest.raises(UserError, match=r"narrowest network takes 0.01 million .* write as much as --macs"):
        on_the_ladder(749.0)


def test_recipe_without_widths_by_group_is_refused() -> None:
    recipe = INet(network=MobileNet(full=0.25))
    trained: Any = SimpleNamespace(recipe=recipe, net=recipe.build(10))
    with pytest.raises(UserError, match="INet has no points that lie below its largest one in one place alone"):
        next(slim(trained, Calibration(), "val", macs=1.0, step=0.1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slim")
    tiny_cifar(folder / "data", TEST_IMAGES)
    cli.main(["train", str(write_recipe(folder)), "--data.held-out", "40", "--recipe.nonuniform"])
    return only_run(folder / "runs")


def test_run_comes_down_to_what_was_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted(run.glob("calibration/*/*"))
    cli.main(["slim", str(run), "--macs", "0.62", "--step", "0.5"])
    said = capsys.readouterr().out.splitlines()
    found = json.loads((run / "slimming.json").read_text())
    macs = [line["macs"] for line in found["lines"]]
    assert macs == sorted(macs, reverse=True)
    assert macs[-1] <= 0.62e6 < macs[-2]
    assert len(said) == len(macs) + 2
    assert (found["split"], found["step"], found["lines"][0]["images"]) == ("held_out", 2, 40)
    assert sorted(run.glob("calibration/*/*")) == kept, "hundreds of points on the way"
    ask = said[-1].partition("--at ")[2]
    assert said[-1].startswith("Its spectrum: ")
    cli.main(["spectrum", str(run), "--at", ask, "--split", "held_out"])
    (line,) = json.loads((run / "spectrum.json").read_text())["lines"]
    assert line == found["lines"][-1], "what the search saw of it is what a spectrum shows"


def test_first_step_is_the_best_of_all_that_could_be_taken(run: Path) -> None:
    """Each measured by itself."""
    trained = open_run(run, ALONE)
    calibration = trained.experiment.calibration
    whole, first = islice(slim(trained, calibration, "held_out", macs=0.5e6, step=0.5), 2)
    prices = {}
    for point in trained.recipe.narrower(trained.net, parse_point(whole.point), 0.5):
        (line,) = trained.measure(trained.calibrated([point], calibration), "held_out")
        assert line.macs is not None
        assert whole.macs is not None
        added, saved = line.loss - whole.loss, whole.macs - line.macs
        prices[line.point] = (added > 0, added / saved if added > 0 else added * saved)
    assert len(prices) == 24
    assert first.point == min(prices, key=prices.__getitem__)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--macs", "0.01"], "The narrowest network takes"),
        (["--macs", "-1"], "No network takes -1 million multiply-accumulates: write for instance --macs 150."),
        (["--macs", "inf"], "No network takes inf million"),
        (["--macs", "nan"], "No network takes nan million"),
        (["--macs", "0.6", "--step", "0"], "A step takes from 0.01 to all of the channels, not 0: write --step 0.1."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(
    options: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, "slim", run, *options)


def test_run_that_holds_no_images_out_is_asked_for_leave_to_choose_by_its_validation_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_cifar(tmp_path / "data", TEST_IMAGES)
    cli.main(["train", str(write_recipe(tmp_path))])
    folder = only_run(tmp_path / "runs")
    assert "train with --data.held-out 1000, or write --split val" in refusal(capsys, "slim", folder, "--macs", "0.6")
    cli.main(["slim", str(folder), "--macs", "0.66", "--split", "val", "--checkpoint", "2", "--images", "48"])
    words = capsys.readouterr().out.splitlines()[-1].split()
    assert words[-4:] == ["--checkpoint", "2", "--images", "48"], "the same network, on the same statistics"
    assert json.loads((folder / "slimming.json").read_text())["split"] == "val"
