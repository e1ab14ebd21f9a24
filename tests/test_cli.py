"""The command line helps, and refuses a mistake before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pliant import cli
from tests.runs import tiny_cifar
from tests.tiny_run import refusal, train_tiny, write_recipe

COMMANDS = ("train", "spectrum", "compare", "calibrate", "slim", "export", "checkpoint", "data")


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_names_every_command(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    said = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(f"\n  {command} " in said for command in COMMANDS)


def test_unknown_command_is_refused_with_those_that_there_are(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["prune"])
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    assert all(command in said.err for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: pliant {command}")
    assert ("--at" in said) == (command in ("spectrum", "calibrate", "export"))


def test_help_of_a_recipe_shows_its_own_values(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(write_recipe(tmp_path)), "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert "--recipe.low" in said
    assert "--optimization.warmup-epochs" in said


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_unknown_option_ends_with_status_2(command, capsys):
    action = {"checkpoint": ["list"], "data": ["verify"]}.get(command, [])
    with pytest.raises(SystemExit) as caught:
        cli.main([command, *action, "RUN", "--points", "0.5"])
    assert caught.value.code == 2
    assert "--points" in capsys.readouterr().err


def test_unknown_option_of_train_ends_with_status_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", str(write_recipe(tmp_path)), "--recipe.lowest", "0.5"])
    assert caught.value.code == 2
    assert "--recipe.lowest" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train"], ["train", "--data.root", "/images"]])
def test_train_without_a_recipe_file_is_refused(arguments, capsys):
    assert "needs a recipe file first: write for instance pliant train" in refusal(capsys, *arguments)


def test_recipe_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert f"There is no recipe file {tmp_path / 'gone.py'}" in refusal(capsys, "train", tmp_path / "gone.py")


@pytest.mark.parametrize("text", ["", "EXPERIMENT = 3\n"])
def test_file_without_an_experiment_is_refused(text, tmp_path, capsys):
    path = tmp_path / "empty.py"
    path.write_text(text)
    assert f"{path} is no recipe file: it must hold EXPERIMENT" in refusal(capsys, "train", path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch.images", "100"], "100 images is no whole number of micro-batches of 16"),
        (["--seed", "-1"], "A seed lies in"),
        (["--recipe.low", "0.9", "--recipe.high", "0.5"], "0 < low <= high <= 1: got 0.9 and 0.5"),
        (["--recipe.rule", "random"], "write --recipe.no-distill"),
        (["--backend", "ddp"], "needs several ranks, and one takes part"),
        (["--deepspeed-config", "ds.json"], "--backend auto has no use for --deepspeed-config"),
        (
            ["--recipe.network.divisor", "16"],
            "--recipe.network: A width divisor of 16 leaves no channel in a layer of 8",
        ),
        (["--recipe.network.divisor", "0"], "A width divisor is at least 1, not 0"),
        (["--optimization.warmup-epochs", "1"], "fills all 2 steps of stage train"),
        (["--batch.images", "208"], "takes 208 images but there are only 200"),
        (["--data.root", "/nowhere"], "CIFAR-10 is not in /nowhere"),
        (["--data.classes", "5"], "has 10 classes, more than the 5 asked for"),
        (["--data.held-out", "200"], "write --data.held-out 20 or another number below 200"),
        (["--ranks", "2"], "--ranks 2 was asked for and 1 take part"),
        (["--compile"], "cannot be compiled: a US-Net draws its widths freely"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_contradiction_is_refused_and_no_run_is_begun(arguments, said, tmp_path, capsys):
    tiny_cifar(tmp_path / "data")
    assert said in refusal(capsys, "train", write_recipe(tmp_path), *arguments)
    assert not (tmp_path / "runs").exists()


def test_checkpoints_are_listed_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train_tiny(tmp_path)
    for action in ("list", "verify"):
        cli.main(["checkpoint", action, str(run)])
        said = capsys.readouterr().out
        assert "step-00000002" in said and "whole" in said and "damaged" not in said
    path = run / "checkpoints" / "step-00000002" / "state.pt"
    state = bytearray(path.read_bytes())
    state[len(state) // 2] ^= 1
    path.write_bytes(state)
    cli.main(["checkpoint", "list", str(run)])
    assert "whole" in capsys.readouterr().out, "its size is right, and list reads no more"
    assert str(path) in refusal(capsys, "checkpoint", "verify", run)
    assert "holds no checkpoint" in refusal(capsys, "checkpoint", "list", tmp_path / "data")
