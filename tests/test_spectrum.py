"""`pliant spectrum` on a run, from training to the picture."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from pliant import cli, record
from pliant.errors import UserError
from pliant.experiment import Data
from pliant.report import spectrum as report
from tests.runs import logged, only_run, tiny_cifar
from tests.tiny_run import MICRO, TEST_IMAGES, refusal, train_tiny, write_recipe

POINTS = ("0.5x", "0.75x", "1x")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps whose spectrum has been measured."""
    folder = train_tiny(tmp_path_factory.mktemp("tiny"))
    cli.main(["spectrum", str(folder)])
    return folder


@pytest.fixture
def measured(run: Path) -> dict[str, object]:
    return report.read(run)


def test_there_is_a_line_for_each_point_of_the_recipe(measured):
    assert [line["point"] for line in measured["lines"]] == list(POINTS)
    assert (measured["name"], measured["method"], measured["step"]) == ("tiny", "USNet", 2)
    assert (measured["split"], measured["generated"]) == ("val", False)
    assert measured["calibration"] == dict(images=64, average="pooled", augment=True, batch=32)


def test_every_image_counts_once(measured):
    assert TEST_IMAGES % MICRO, "the last batch is a short one"
    for line in measured["lines"]:
        assert line["images"] == TEST_IMAGES
        for name in ("top1", "top5"):
            assert line[name] * TEST_IMAGES == pytest.approx(round(line[name] * TEST_IMAGES))
        assert 0 <= line["top1"] <= line["top5"] <= 1


def test_cost_is_that_of_an_ordinary_network_of_this_shape(run, measured):
    recipe = record.load(run).recipe
    net = recipe.build(10)
    for line in measured["lines"]:
        ordinary = net.skeleton(float(line["point"].removesuffix("x"))).eval()
        with FlopCounterMode(display=False) as counter:
            ordinary(torch.zeros(1, 3, 32, 32))
        assert line["macs"] == counter.get_total_flops() / 2
        assert line["parameters"] == sum(parameter.numel() for parameter in ordinary.parameters())
    assert [line["macs"] for line in measured["lines"]] == sorted({line["macs"] for line in measured["lines"]})


def test_range_is_measured_with_both_ends(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    cli.main(["spectrum", str(copied), "--at", "0.5:0.1:0.7", "1"])
    assert [line["point"] for line in report.read(copied)["lines"]] == ["0.5x", "0.6x", "0.7x", "1x"]
    assert f"picture: {copied / 'spectrum.png'}" in capsys.readouterr().out


def test_statistics_are_kept_and_used_again(run, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    kept = sorted((copied / "calibration").rglob("*.safetensors"))
    assert [path.name.split("-")[0] for path in kept] == list(POINTS)
    times = [path.stat().st_mtime_ns for path in kept]
    cli.main(["calibrate", str(copied), "--at", "0.5", "0.75", "0.8", "1"])
    assert [path.stat().st_mtime_ns for path in kept] == times
    cli.main(["calibrate", str(copied), "--at", "0.5", "--average", "moving"])
    assert len(sorted((copied / "calibration").rglob("*.safetensors"))) == len(kept) + 2


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_table_shows_every_figure_whole_whatever_the_terminal(measured, columns):
    console = Console(width=columns, file=io.StringIO())
    console.print(report.table(measured))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= columns
    for line in measured["lines"]:
        figures = (line["point"], f"{100 * line['top1']:.2f}", f"{line['loss']:.3f}", f"{line['macs'] / 1e6:.2f}")
        assert any(all(f" {figure} " in row for figure in figures) for row in lines)


def test_widths_of_many_groups_leave_room_for_the_figures(measured):
    line = {**measured["lines"][0], "point": "/".join(["0.835"] * 24) + "x"}
    console = Console(width=80, file=io.StringIO())
    console.print(report.table({**measured, "lines": [line]}))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(" 0.835/0.83… " in row for row in lines)
    assert report.label("0.075x") == "0.075x"


def test_title_says_what_was_measured_on_what(measured):
    assert report.title(measured) == "tiny: one USNet after 2 steps, 40 validation images"
    generated = {**measured, "generated": True, "split": "held_out"}
    assert report.title(generated) == "tiny: one USNet after 2 steps, 40 generated held-out images"


def test_picture_opens(run):
    with Image.open(run / "spectrum.png") as picture:
        picture.load()
        assert min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(2**20)) > 3, "it is not blank"
    assert sorted(path.name for path in run.glob("spectrum*")) == ["spectrum.json", "spectrum.png"]


def test_tensorboard_has_the_spectrum(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = EventAccumulator(str(run / "tensorboard")).Reload()
    for line in json.loads((run / "spectrum.json").read_text())["lines"]:
        (event,) = boards.Scalars(f"spectrum/top1/{line['point']}")
        assert event.step == 2
        assert event.value == pytest.approx(line["top1"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--at", "0.4"], "Width 0.4 lies outside the trained range: write a width from 0.5 to 1."),
        (["--at", "0.3:0.1:0.6"], "Width 0.3 lies outside the trained range"),
        (["--at", "native"], "native is not a width"),
        (["--at", "half"], "'half' is not a point"),
        (["--at", "1:0.1:0.5"], "is no range of widths"),
        (["--at", "0.5/1"], "24 groups of layers, not 2"),
        (["--at", "2"], "A width lies above 0 and is at most 1, not 2"),
        (["--images", "-5"], "no variance with --calibration.images -5"),
        (["--split", "held_out"], "No training images are held out: write for instance --data.held-out 1000."),
        (["--checkpoint", "best"], "no checkpoint with a score on a held-out split"),
        (["--root", "/nowhere"], "CIFAR-10 is not in /nowhere"),
        (["--size", "64"], "The images of cifar10 are fed as they are, 32 x 32 pixels: leave --size out."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_and_the_spectrum_stays(options, said, run, capsys):
    before, calibrated = (run / "spectrum.json").read_bytes(), sorted(run.glob("calibration/*/*"))
    images = [] if "--images" in options else ["--images", "48"]  # what would have to be calibrated first
    assert said in refusal(capsys, "spectrum", run, *options, *images)
    assert (run / "spectrum.json").read_bytes() == before
    assert sorted(run.glob("calibration/*/*")) == calibrated, "refused before anything is calibrated"


def test_statistics_that_are_torn_are_measured_anew(run, capsys):
    (kept,) = run.glob("calibration/*/0.5x*")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])
    cli.main(["calibrate", str(run), "--at", "0.5"])
    assert "Calibrated 0.5x" in capsys.readouterr().out
    assert kept.read_bytes() == whole


def test_folder_that_is_no_run_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "gone"):
        assert f"{folder} is no run: it has no experiment.json" in refusal(capsys, "spectrum", folder)


def test_run_without_a_checkpoint_is_refused(tmp_path, capsys):
    experiment = record.load_recipe_file(write_recipe(tmp_path)).EXPERIMENT
    (tmp_path / "experiment.json").write_text(record.dump(experiment))
    assert "holds no checkpoint that is whole: train first" in refusal(capsys, "spectrum", tmp_path)


def test_run_of_another_network_than_its_checkpoint_s_is_refused(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    plain = json.loads((copied / "experiment.json").read_text())
    plain["recipe"]["network"]["full"] = 0.5
    (copied / "experiment.json").write_text(json.dumps(plain))
    assert "holds another network: features.0.0.weight is (8, 3, 3, 3) there and (16" in refusal(
        capsys, "spectrum", copied
    )


def test_run_whose_spectrum_was_never_measured_has_none_to_show(tmp_path):
    with pytest.raises(UserError, match=f"has no spectrum yet: write pliant spectrum {tmp_path}"):
        report.read(tmp_path)


def test_best_on_the_held_out_images_is_kept_and_measured(tmp_path):
    """A rate far too high: the network is at its best early on, long gone from the newest checkpoints."""
    tiny_cifar(tmp_path / "data", TEST_IMAGES)
    followed = ("--data.held-out", "40", "--evaluate-epochs", "0.4", "--saving.every-steps", "1")
    wild = ("--optimization.steps", "20", "--optimization.lr", "3")
    cli.main(["train", str(write_recipe(tmp_path)), *followed, *wild])
    run = only_run(tmp_path / "runs")
    scores = {line["step"]: sum(point["top1"] for point in line["lines"]) for line in logged(run, "held_out")}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert best < 18
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (best, 19, 20)
    ]
    cli.main(["spectrum", str(run), "--checkpoint", "best", "--split", "held_out", "--at", "0.5", "1"])
    found = report.read(run)
    assert (found["step"], found["split"]) == (best, "held_out")


def test_trained_network_is_asked_at_another_size_of_images(image_folder, tmp_path, capsys):
    """Calibrated on images of that size too."""
    settings = dict(source="folder", root=image_folder, size=32, resize=40, loader="torchvision", classes=10)
    given = [text for name, value in settings.items() for text in (f"--data.{name}", str(value))]
    short = ("--batch.images", "16", "--batch.micro", "8", "--calibration.images", "16", "--calibration.batch", "8")
    cli.main(["train", str(write_recipe(tmp_path)), *given, *short])
    run = only_run(tmp_path / "runs")
    found = {}
    for asked, size in ((), 32), (("--size", "64"), 64):
        cli.main(["spectrum", str(run), "--at", "0.5", *asked])
        found[size] = report.read(run)
        assert report.title(found[size]).endswith(" of 64 px") == (size == 64), "no other size than it was trained at"
    classifier = 10 * 320
    convolutions = [found[size]["lines"][0]["macs"] - classifier for size in (32, 64)]
    assert convolutions[1] == 4 * convolutions[0]
    assert found[32]["lines"][0]["loss"] != found[64]["lines"][0]["loss"]
    assert len(list(run.glob("calibration/*/0.5x*"))) == 2
    assert Data(size=32, resize=40).at_size(64) == Data(size=64, resize=80)
    assert "Images of 0 pixels cannot be" in refusal(capsys, "spectrum", run, "--size", "0")


S_NET = """
from pathlib import Path
from pliant.experiment import Batching, Calibration, Data, Experiment, Optimization
from pliant.methods.s_net import SNet
from pliant.networks.mobilenet import MobileNet

EXPERIMENT = Experiment(
    name="switches",
    recipe=SNet(network=MobileNet(full=0.25, divisor=4), widths=(1.0, 0.5)),
    data=Data(source="cifar10", root=Path({root!r})),
    batch=Batching(images=32, micro=16),
    optimization=Optimization(lr=0.1, steps=6),
    calibration=Calibration(images=64, batch=32),
    runs=Path({runs!r}),
)
"""


def test_switches_of_an_s_net_are_asked_with_the_statistics_they_trained_with(tmp_path, capsys):
    """As validation asked them; a width between them has none, and is calibrated."""
    tiny_cifar(tmp_path / "data", TEST_IMAGES)
    recipe = tmp_path / "switches.py"
    recipe.write_text(S_NET.format(root=str(tmp_path / "data"), runs=str(tmp_path / "runs")))
    cli.main(["train", str(recipe), "--evaluate-epochs", "1"])
    run = only_run(tmp_path / "runs")
    followed = {line["point"]: line for line in logged(run, "val")[-1]["lines"]}
    cli.main(["spectrum", str(run), "--at", "1", "0.75", "0.5"])
    for line in report.read(run)["lines"]:
        if line["point"] in followed:
            assert (line["top1"], line["loss"]) == pytest.approx(
                (followed[line["point"]]["top1"], followed[line["point"]]["loss"])
            )
    assert [path.name.split("-")[0] for path in run.glob("calibration/*/*")] == ["0.75x"]
    said = refusal(capsys, "spectrum", run, "--at", "0.5", "--images", "48")
    assert said.startswith("Nothing is calibrated here") and said.endswith("leave --images out.")
    cli.main(["spectrum", str(run), "--at", "0.5"])
    assert report.read(run)["calibration"] is None
    cli.main(["export", str(run), "--at", "0.5", "--formats", "safetensors"])
    assert len(list(run.glob("calibration/*/*"))) == 1, "nor does exporting calibrate them"
