"""A checkpoint is whole or absent, and damage is named and stepped over."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.engine import checkpoint
from pliant.engine.checkpoint import Checkpoint
from pliant.errors import UserError
from pliant.methods.i_net import INet
from pliant.methods.s_net import SNet
from pliant.networks.mobilenet import MobileNet
from tests.small_recipes import Plain

FILES = ("state.pt", "manifest.json")


def state(step: int, numbers: int = 20) -> dict[str, Any]:
    return {
        "net": {"weight": torch.arange(float(numbers)) + step, "coarse": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"momentum": torch.full((2, 2), 0.5)}}, "groups": [{"lr": 0.1}]},
        "ema": None,
        "step": step,
    }


def save(folder: Path, step: int, score: float | None = None, keep: int = 2, numbers: int = 20) -> Path:
    return checkpoint.save(folder, step, state(step, numbers), score=score, keep=keep)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.folders(folder)]


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = save(tmp_path / "checkpoints", 12, score=0.25)
    assert path.name == "step-00000012"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    found = checkpoint.verify(path)
    assert found == Checkpoint(path, 12, 0.25) == checkpoint.newest(tmp_path / "checkpoints")
    torch.testing.assert_close(found.load(), state(12), atol=0, rtol=0)


@pytest.mark.parametrize("name", FILES)
def test_a_byte_that_changes_is_noticed_and_its_file_named(name, tmp_path):
    path = save(tmp_path, 3)
    file = path / name
    whole = file.read_bytes()
    generator = random.Random(0)
    for place in sorted({0, len(whole) - 1, *generator.choices(range(len(whole)), k=200)}):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        said = checkpoint.verify(path)
        assert isinstance(said, str), f"byte {place} of {name}"
        assert said.startswith(f"{file} is damaged: ")
    file.write_bytes(whole)
    assert isinstance(checkpoint.verify(path), Checkpoint)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["emptied", "halved", "one byte short", "one byte long", "deleted", "a folder"])
def test_damaged_file_is_named_and_the_checkpoint_before_it_used(harm, name, tmp_path):
    save(tmp_path, 1)
    before = save(tmp_path, 2)
    file = save(tmp_path, 3, keep=3) / name
    content = file.read_bytes()
    kept = {"emptied": b"", "halved": content[: len(content) // 2], "one byte short": content[:-1]}
    file.unlink()
    if harm == "a folder":
        file.mkdir()
    elif harm != "deleted":
        file.write_bytes(kept.get(harm, content + b"x"))
    with pytest.warns(UserWarning, match=f"{file} .*; it is stepped over") as warned:
        found = checkpoint.newest(tmp_path)
    assert len(warned) == 1
    assert found == Checkpoint(before, 2, None)


def test_each_damaged_checkpoint_is_stepped_over(tmp_path):
    paths = [save(tmp_path, step, keep=4) for step in (1, 2, 3, 4)]
    for path in paths[2:]:
        (path / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged") as warned:
        assert checkpoint.newest(tmp_path).step == 2
    assert [str(path) in str(one.message) for path, one in zip(paths[:1:-1], warned, strict=True)] == [True, True]
    for path in paths[:2]:
        shutil.rmtree(path)
    with pytest.warns(UserWarning, match="is damaged"):
        assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize(
    ("scores", "keep", "left"),
    [
        ((None,) * 5, 2, [4, 5]),
        ((None,) * 5, 3, [3, 4, 5]),
        ((0.1, 0.9, 0.3, 0.2, 0.1), 2, [2, 4, 5]),
        ((0.1, 0.2, 0.3, 0.4, 0.5), 2, [4, 5]),
        ((0.5, 0.5, None, 0.5, None), 2, [1, 4, 5]),
        ((-2.0, 0.0, -1.0, -1.0, -3.0), 2, [2, 4, 5]),
    ],
)
def test_the_newest_and_the_best_are_kept(scores, keep, left, tmp_path):
    for step, score in enumerate(scores, start=1):
        save(tmp_path, step, score, keep)
    assert steps(tmp_path) == left
    assert checkpoint.newest(tmp_path).step == 5
    scored = [(score, -step) for step, score in enumerate(scores, start=1) if score is not None]
    assert (checkpoint.best(tmp_path) is None) if not scored else checkpoint.best(tmp_path).step == -max(scored)[1]


def test_a_lasting_one_stays_and_takes_no_other_s_place(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, state(step), score=None, keep=2, lasting=step == 1)
    assert steps(tmp_path) == [1, 3, 4]
    assert checkpoint.require(tmp_path, "1").lasting


def test_manifest_from_before_there_were_lasting_ones_is_read(tmp_path):
    path = save(tmp_path, 3) / FILES[1]
    manifest = json.loads(path.read_text())
    for name in ("lasting", "sha256"):
        manifest.pop(name)
    path.write_text(json.dumps({**manifest, "sha256": checkpoint._digest(manifest)}))
    assert checkpoint.verify(path.parent) == Checkpoint(path.parent, 3, None)
    assert save(tmp_path, 4).exists() and steps(tmp_path) == [3, 4]


def test_one_that_was_kept_is_asked_for_by_its_step(tmp_path):
    for step in (20, 300):
        save(tmp_path, step, score=0.5)
    assert checkpoint.require(tmp_path, "20").step == 20
    assert checkpoint.require(tmp_path, "newest").step == 300
    for wrong in ("21", "last"):
        with pytest.raises(UserError, match=rf"no checkpoint of step {wrong}: .* newest, best or one of 20, 300"):
            checkpoint.require(tmp_path, wrong)
    (tmp_path / "step-00000020" / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.require(tmp_path, "20")


def test_best_passes_over_a_damaged_one(tmp_path):
    save(tmp_path, 1, 0.5)
    damaged = save(tmp_path, 2, 0.9)
    (damaged / "state.pt").write_bytes(b"")
    assert checkpoint.best(tmp_path).step == 1


def test_saving_the_same_step_again_replaces_it(tmp_path):
    damaged = save(tmp_path, 2)
    (damaged / "state.pt").write_bytes(b"")
    save(tmp_path, 2, numbers=33)
    assert len(checkpoint.newest(tmp_path).load()["net"]["weight"]) == 33
    assert steps(tmp_path) == [2]


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("flushes", [1, 2, 3, 4])
def test_stopped_at_any_flush_it_is_whole_or_absent(flushes, again, tmp_path, monkeypatch):
    """As in a power cut: nothing is cleaned up. `again`: the step had been saved before."""
    old = save(tmp_path, 1)
    if again:
        save(tmp_path, 2)
    count, fsync = 0, os.fsync

    def cut(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == flushes:
            raise PowerCut
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", cut)
    with pytest.raises(PowerCut):
        save(tmp_path, 2, numbers=50)
    monkeypatch.undo()
    found = checkpoint.newest(tmp_path)
    written = flushes == 4
    assert found.step == (2 if written or again else 1)
    assert len(found.load()["net"]["weight"]) == (50 if written else 20)
    save(tmp_path, 2, numbers=60)
    assert len(checkpoint.newest(tmp_path).load()["net"]["weight"]) == 60
    assert steps(tmp_path) == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [old.name, "step-00000002"]


def test_what_is_half_written_or_half_removed_is_no_checkpoint(tmp_path):
    path = save(tmp_path, 5)
    shutil.copytree(path, tmp_path / "step-00000006.partial")
    shutil.copytree(path, tmp_path / "step-00000007.removed")
    (tmp_path / "step-00000008").write_text("a file")
    assert steps(tmp_path) == [5]
    assert checkpoint.newest(tmp_path).path == path


def test_what_a_killed_process_left_goes_with_the_next_save(tmp_path):
    path = save(tmp_path, 5)
    shutil.copytree(path, tmp_path / "step-00000006.partial")
    shutil.copytree(path, tmp_path / "step-00000007.removed")
    save(tmp_path, 8)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["step-00000005", "step-00000008"]


def test_damaged_checkpoints_do_not_take_the_place_of_whole_ones(tmp_path):
    """The run went on from step 8, past those of steps 13 and 16: it saves at other steps than before."""
    for step in (4, 8, 13, 16):
        path = save(tmp_path, step, keep=4)
        if step > 8:
            (path / "state.pt").write_bytes(b"torn")
    written = save(tmp_path, 10)
    assert steps(tmp_path) == [8, 10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path).path == written


def test_full_disk_leaves_nothing_of_the_new_checkpoint_and_all_of_the_old(small_disk):
    folder = small_disk / "checkpoints"
    save(folder, 1, numbers=10_000)
    before = sorted(folder.rglob("*"))
    for _ in range(3):
        with pytest.raises(OSError, match="No space left") as caught:
            save(folder, 2, numbers=100_000)
        assert caught.value.errno == errno.ENOSPC
        assert sorted(folder.rglob("*")) == before
        assert checkpoint.newest(folder).step == 1
    save(folder, 3, numbers=10_000)
    assert checkpoint.newest(folder).step == 3


def test_run_without_a_whole_or_without_a_scored_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint that is whole: train first"):
        checkpoint.require(tmp_path / "none", "newest")
    save(tmp_path, 1)
    with pytest.raises(UserError, match="no checkpoint with a score on a held-out split"):
        checkpoint.require(tmp_path, "best")
    assert checkpoint.require(tmp_path, "newest").step == 1
    save(tmp_path, 2, score=0.5)
    save(tmp_path, 3, score=0.4)
    assert checkpoint.require(tmp_path, "best").step == 2


TINY = MobileNet(full=0.25, divisor=4)


@pytest.mark.parametrize(
    ("kept", "classes", "said"),
    [
        (INet(network=TINY), 7, "classifier.1.weight is (7, 320) there and (10, 320) in this recipe's network"),
        (INet(network=TINY, width=0.5), 10, "features.0.0.weight is (4, 3, 3, 3) there and (8, 3, 3, 3)"),
        (SNet(network=TINY, widths=(1.0, 0.5)), 10, "features.1.conv.2.mean_1 is (4,) there and missing"),
        (Plain(), 10, "features.0.0.weight is missing there and (8, 3, 3, 3)"),
    ],
)
def test_checkpoint_of_another_network_is_refused_by_the_first_difference(kept, classes, said):
    net = INet(network=TINY).build(10)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(UserError) as caught:
        checkpoint.load_weights(net, kept.build(classes).state_dict(), Path("runs/a/step-00000001"))
    assert str(caught.value).startswith(f"runs/a/step-00000001 holds another network: {said}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_checkpoint_of_the_same_network_is_loaded():
    torch.manual_seed(0)
    one, other = INet(network=TINY).build(10), INet(network=TINY).build(10)
    checkpoint.load_weights(one, other.state_dict(), Path("here"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
