"""What a person follows while a run trains: validation, TensorBoard, and the bar on a terminal."""

from __future__ import annotations

import io
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant import cli, record
from pliant.engine import telemetry
from pliant.engine.folder import RunFolder
from pliant.engine.telemetry import Telemetry, Window
from tests.runs import final_state, logged, only_run, tiny_cifar
from tests.tiny_run import TEST_IMAGES, write_recipe

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data/, and the runs/ of one run whose log has each step."""
    folder = tmp_path_factory.mktemp("followed")
    tiny_cifar(folder / "data", TEST_IMAGES)
    settings = ("--optimization.steps", str(STEPS), "--log-steps", "1", "--threads", "1")
    cli.main(["train", str(write_recipe(folder)), *settings])
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return only_run(folder / "runs")


def validation_images(root: Path) -> tuple[Tensor, Tensor]:
    """Read and normalised with CIFAR-10's published statistics."""
    rows = np.fromfile(root / "cifar-10-batches-bin" / "test_batch.bin", np.uint8).reshape(-1, 3073)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    pixels = torch.from_numpy(rows[:, 1:].reshape(-1, 3, 32, 32).copy()).float() / 255
    return (pixels - mean) / std, torch.from_numpy(rows[:, 0].astype(np.int64))


def cut_out(plain: nn.Module, weights: dict[str, Tensor], which: int) -> nn.Module:
    """An ordinary network of one width's shape, with the first of all channels and the statistics of set `which`;
    layers that all widths have alike keep one set."""
    there = {}
    for name, like in plain.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        layer, _, kind = name.rpartition(".")
        if kind.startswith("running_"):
            number = which if f"{layer}.mean_1" in weights else 0
            source = weights[f"{layer}.{kind.removeprefix('running_')}_{number}"]
        else:
            source = weights[name]
        there[name] = source[tuple(slice(size) for size in like.shape)]
    plain.load_state_dict(there, strict=False)
    return plain.eval()


def test_validation_asks_each_bound_of_the_widths_with_the_running_statistics_kept_for_it(
    folder: Path, run: Path
) -> None:
    """US-Nets section 3.2: the bounds need no calibration to be followed. Against plain layers, all images at once."""
    line = logged(run, "val")[-1]
    assert (line["step"], [one["point"] for one in line["lines"]]) == (STEPS, ["0.5x", "1x"])
    shape = record.load(run).recipe.build(10)
    images, labels = validation_images(folder / "data")
    weights = final_state(run)["net"]
    assert isinstance(weights, dict)

    def logits(width: float, which: int) -> Tensor:
        with torch.no_grad():
            answer: Tensor = cut_out(shape.skeleton(width), weights, which)(images)
        return answer

    for which, (width, said) in enumerate(zip((0.5, 1.0), line["lines"], strict=True)):
        answer = logits(width, which)
        hits = (answer.topk(5).indices == labels[:, None]).double()
        assert said["images"] == TEST_IMAGES
        assert said["loss"] == pytest.approx(cross_entropy(answer, labels).item(), rel=1e-5)
        assert said["top1"] == pytest.approx(hits[:, 0].mean().item())
        assert said["top5"] == pytest.approx(hits.sum(1).mean().item())
    swapped = cross_entropy(logits(0.5, 1), labels).item()
    assert swapped != pytest.approx(line["lines"][0]["loss"], rel=1e-4), "those of the other width would show"


def test_tensorboard_has_the_loss_of_each_pass_of_each_step(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    boards = EventAccumulator(str(run / "tensorboard")).Reload()
    steps = logged(run, "step")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    passes = steps[0]["losses"]
    assert list(passes) == ["1x", "0.5x", "random"]
    assert {tag for tag in boards.Tags()["scalars"] if tag.startswith("loss/")} == {f"loss/{name}" for name in passes}
    assert "run/images_per_s" in boards.Tags()["scalars"]
    assert "run/memory_gib" not in boards.Tags()["scalars"], "there is no GPU to tell of"
    for name in passes:
        events = boards.Scalars(f"loss/{name}")
        assert [event.step for event in events] == [line["step"] for line in steps]
        assert [event.value for event in events] == pytest.approx([line["losses"][name] for line in steps])


def test_bar_on_a_terminal_has_speed_and_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the lines that a log file gets; what is said stays above it. 80 columns, as terminals open."""
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr(telemetry, "Console", partial(Console, force_terminal=True, width=80, file=screen))
    window = Window(
        step=3,
        steps=12,
        stage="joint",
        epoch=0.5,
        lr=0.1,
        losses={"1x": 2.345, "0.35x": 2.567, "random 1": 2.456, "random 2": 2.501},
        metrics={},
        norm=1.0,
        skipped=0,
        seconds=1.0,
        images_per_s=321.0,
        passes_per_s=40.0,
        data_share=0.1,
        rank_seconds=(1.0,),
        memory_gib=11.52,
        seconds_left=9.0,
    )
    with Telemetry(RunFolder(tmp_path), first=True, step=0) as shown:
        shown.say("run folder")
        shown.window(window)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert "run folder" in lines
    (bar,) = {line for line in lines if line.startswith("epoch 0.5")}
    assert all(text in bar for text in (" 25%", "321 images/s", "left 0:09"))
    assert "━" in bar
    assert "1x 2.345  0.35x 2.567  random 1 2.456  random 2 2.501" in {line.rstrip() for line in lines}
    assert max(map(len, lines[:-1])) <= 80
    last = [line for line in lines if line.strip()][-1]
    assert last.startswith("step 3/12"), "the last words stay"
    assert "memory 11.5 GiB" in last
    (kept,) = logged(tmp_path, "step")
    assert (kept["losses"], kept["memory_gib"]) == (window.losses, 11.52), "the log has it all the same"


@pytest.mark.parametrize("left", [b"", b'{"event": "step", "st', b"{", b'{"event": "start"}\n{"event": "step"'])
def test_line_that_a_kill_tore_is_cut_off_before_the_next(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "start"}\n' + left)
    with Telemetry(RunFolder(tmp_path), first=True, step=0) as shown:
        shown.event("resumed", step=3)
        shown.event("end")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start"] * (1 + left.count(b"\n")) + ["resumed", "end"]
