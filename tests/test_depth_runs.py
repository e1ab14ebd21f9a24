"""Methods on depth, run as a user runs them: stages, resume, spectrum, pictures, refusals."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pliant import cli
from pliant.engine import checkpoint
from pliant.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR
from pliant.networks.resnet import ResNet
from pliant.report import blocks
from tests.runs import Launch, begun_at, command, final_state, finish, logged, losses, only_run, same, tiny_cifar
from tests.test_resume import start, wait_for
from tests.tiny_run import refusal

STEPS = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cifar(tmp_path_factory.mktemp("data"))


def given(data: Path, runs: Path, method: str, *more: str) -> list[str]:
    settings = {
        "data.root": data,
        "data.held-out": 0,
        "runs": runs,
        "recipe.network.depth": 14,
        "batch.images": 16,
        "batch.micro": 8,
        "optimization.steps": STEPS,
        "threads": 1,
        "log-steps": 1,
        "saving.every-steps": 2,
        "saving.keep": STEPS,
    }
    settings |= {"recipe.gates-share": 0.5} if method == "urnet" else {}
    settings |= (
        {"recipe.curriculum-share": 0.5, "recipe.grow": 0.5, "recipe.curriculum-batch": 2}
        if method == "blockdrop"
        else {}
    )
    settings |= {"recipe.sp-share": 0.5} if method == "skipnet" else {}
    flat = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return command(*flat, *more, recipe=f"{method}_cifar10")


METHODS = ("skipnet", "blockdrop", "urnet")


@pytest.fixture(scope="module", params=METHODS)
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp(request.param)
    done = finish(given(data, runs, request.param))
    assert done.returncode == 0, done.stderr
    return only_run(runs)


def test_run_has_its_stages(run: Path) -> None:
    names = [line["stage"] for line in logged(run, "step")]
    assert len(names) == STEPS
    assert len(dict.fromkeys(names)) == 2
    warned = [line["text"] for line in logged(run, "warning") if "random weights" in line["text"]]
    assert bool(warned) == (names[0] in ("gates", "curriculum")), "a stage for gates alone wants a trained network"
    assert names == sorted(names, key=names.index), "one after the other"


def test_a_stage_may_take_more_images_a_step(run: Path) -> None:
    """BlockDrop's curriculum here: 200 images make 6 steps of 32, or 12 of 16."""
    steps = logged(run, "step")
    assert 1 / steps[0]["epoch"] == pytest.approx(6 if steps[0]["stage"] == "curriculum" else 12)
    assert steps[-1]["epoch"] == pytest.approx(STEPS / 2 / 12)


def test_spectrum_has_blocks_costs_and_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["spectrum", str(run)])
    said = capsys.readouterr().out
    measured = json.loads((run / "spectrum.json").read_text())
    for line in measured["lines"]:
        assert 0 <= line["figures"]["blocks"] <= 6
        assert line["figures"]["policies"] >= 1
        assert line["macs_sd"] >= 0
        assert line["images"] == 40
    with np.load(run / "spectrum.npz") as rows:
        point = measured["lines"][0]["point"]
        opened, macs = rows[f"{point}/open"], rows[f"{point}/macs"]
        assert opened.shape == (40, 6)
        assert macs.mean() == pytest.approx(measured["lines"][0]["macs"])
        assert sorted(rows[f"{point}/position"].tolist()) == list(range(40))
        middle = measured["lines"][len(measured["lines"]) // 2]["point"]
        right = rows[f"{middle}/right"]
        differ = any(np.ptp(rows[f"{line['point']}/macs"]) > 0 for line in measured["lines"])
        for end in ("easiest", "hardest"):
            assert right[rows[f"{middle}/{end}_rows"]].all()
            assert rows[f"{middle}/{end}"].shape == (min(16, right.sum()), 32, 32, 3)
    assert (run / "images.png").is_file() == differ, "where all images cost alike there are no easy and no hard ones"
    several = len(measured["lines"]) > 1
    always = ("spectrum.png", "blocks.png", "classes.png", "policies.png")
    for name in (*always, *["scales.png"] * several, *["images.png"] * differ):
        assert f"{run / name}" in said
        with Image.open(run / name) as picture:
            assert min(picture.size) > 250
            assert np.ptp(np.asarray(picture.convert("RGB")), axis=2).max() > 50, "colours, besides what is written"
    masked = json.loads((run / "spectrum.json").read_text())
    cli.main(["spectrum", str(run), "--execution", "grouped"])
    grouped = json.loads((run / "spectrum.json").read_text())
    for one, other in zip(masked["lines"], grouped["lines"], strict=True):
        assert one["top1"] == other["top1"]
        assert one["macs"] == other["macs"]


def test_where_all_images_cost_alike_none_are_shown_as_easy_or_hard(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    cli.main(["spectrum", str(copied)])
    with np.load(copied / "spectrum.npz") as rows:
        kept = {name: np.ones_like(rows[name]) if name.endswith("/macs") else rows[name] for name in rows.files}
    np.savez(copied / "spectrum.npz", **kept)
    (copied / "images.png").touch()  # of an earlier spectrum
    drawn = [path.name for path in blocks.draw(copied)]
    assert drawn[:3] == ["blocks.png", "classes.png", "policies.png"]
    assert "images.png" not in drawn
    assert not (copied / "images.png").exists()


@pytest.mark.parametrize("step", [4, 7])
def test_stopped_before_and_after_the_change_of_stage_it_ends_the_same(
    data: Path, run: Path, tmp_path: Path, step: int
) -> None:
    """Bit for bit."""
    method = run.parent.name.removesuffix("_cifar10")
    process = start(given(data, tmp_path, method))
    wait_for(process, f"step {step}/{STEPS}")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == EXIT_INTERRUPTED
    done = finish(given(data, tmp_path, method, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    assert begun_at(only_run(tmp_path))[-1] >= step
    one, two = final_state(only_run(tmp_path)), final_state(run)
    for name in ("net", "rows", "optimizer"):
        assert same(one[name], two[name]), name


def test_stopped_between_two_stages_it_ends_the_same(data: Path, run: Path, tmp_path: Path) -> None:
    """Bit for bit: the first has done its last step, and the second begins with an optimizer of its own."""
    method, between = run.parent.name.removesuffix("_cifar10"), STEPS // 2
    stages = [line["stage"] for line in logged(run, "step")]
    assert stages.index(stages[-1]) == between
    copied = shutil.copytree(run, tmp_path / run.parent.name / run.name)
    for path in (copied / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > between:
            shutil.rmtree(path)
    cli.main(["train", *given(data, tmp_path, method, "--resume", str(copied))[1:]])
    assert begun_at(copied) == [0, between]
    assert losses(copied) == losses(run)
    one, two = final_state(copied), final_state(run)
    for name in ("net", "rows", "optimizer"):
        assert same(one[name], two[name]), name


def test_checkpoint_at_the_end_of_a_stage_is_kept(data: Path, tmp_path: Path) -> None:
    """Due or not, and however many newer ones there are."""
    cli.main(["train", *given(data, tmp_path, "urnet", "--saving.keep", "2", "--saving.every-steps", "4")[1:]])
    left = [path.name for path in checkpoint.folders(only_run(tmp_path) / "checkpoints")]
    assert left == [f"step-{step:08d}" for step in (STEPS // 2, 8, 12)]


def test_pretrained_weights_are_begun_with_and_others_refused(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ResNet(depth=14).build(10)
    save_file(net.state_dict(), tmp_path / "r14.safetensors")
    pretrained = ["--recipe.pretrained", str(tmp_path / "r14.safetensors"), "--optimization.steps", "0"]
    done = finish(given(data, tmp_path / "right", "urnet", *pretrained))
    assert done.returncode == 0, done.stderr
    begun = final_state(only_run(tmp_path / "right"))["net"]
    for name, tensor in net.state_dict().items():
        assert torch.equal(begun[f"backbone.{name}"], tensor), name
    done = finish(given(data, tmp_path / "wrong", "urnet", *pretrained, "--recipe.network.depth", "20"))
    assert done.returncode == EXIT_USER_ERROR
    assert "holds the weights of another network" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "wrong").exists(), "nothing was begun"


def test_exported_weights_with_another_shortcut_are_refused(data: Path, tmp_path: Path) -> None:
    """Neither kind has weights: names and shapes alone would let them pass."""
    pool = ["--recipe.network.shortcut", "pool", "--optimization.steps", "0", "--optimization.warmup-epochs", "0"]
    assert finish(given(data, tmp_path / "plain", "resnet", *pool)).returncode == 0
    plain = only_run(tmp_path / "plain")
    cli.main(["export", str(plain), "--at", "native", "--formats", "safetensors", "torch"])
    folder = plain / "export" / "native"
    net = ResNet(depth=14, shortcut="pool").build(10).eval()
    net.load_state_dict(load_file(folder / "model.safetensors"))
    program = torch.export.load(folder / "model.pt2")
    assert not any("batch" in str(node.target) for node in program.graph.nodes), "its convolutions took them in"
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), net(images), atol=1e-4, rtol=1e-4)
    weights = ["--recipe.pretrained", str(plain / "export" / "native" / "model.safetensors")]
    done = finish(given(data, tmp_path / "begun", "blockdrop", *weights, "--optimization.steps", "0"))
    assert done.returncode == 0, done.stderr
    done = finish(given(data, tmp_path / "other", "urnet", *weights))
    assert done.returncode == EXIT_USER_ERROR
    assert "write --recipe.network.shortcut pool, not pad" in done.stderr
    done = finish(given(data, tmp_path / "other", "skipnet", *weights))
    assert "write --recipe.network.shortcut pool, not conv" in done.stderr


def test_what_makes_no_sense_for_a_method_is_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "spectrum", run, "--at", "0.5")
    assert "is none of this recipe's points" in said or "is not a scale" in said
    assert "no ordinary network to export" in refusal(capsys, "export", run, "--at", _point(run))


def _point(run: Path) -> str:
    return "S0.5" if "urnet" in str(run) else "native"


def test_part_frozen_after_it_learned_is_the_same_on_all_ranks(data: Path, tmp_path: Path) -> None:
    """The policy network's batch norms run on each rank's own images, and then stand still: at one place."""
    shares = ("--recipe.policy-share", "0.25", "--verify-gradients", str(STEPS))
    for status, said in Launch(given(data, tmp_path, "blockdrop", *shares)).start().finish():
        assert status == 0, said
    stages = [line["stage"] for line in logged(only_run(tmp_path), "step")]
    assert list(dict.fromkeys(stages)) == ["classify", "curriculum", "joint"]
