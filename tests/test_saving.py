"""Checkpoints are written in the background, from a copy."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pliant.engine import checkpoint
from pliant.engine.agreement import Beats
from pliant.engine.ranks import Ranks
from pliant.engine.saving import Copy, Saver
from pliant.errors import UserError
from pliant.experiment import Saving

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_copy_is_taken_at_once_and_its_memory_kept() -> None:
    value = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    state = {"net": {"weight": value}, "step": 3, "none": None, "list": [1, 2]}
    copies = Copy()
    taken = copies.take(state)
    assert torch.equal(taken["net"]["weight"], value)
    assert taken["net"]["weight"].stride() == value.stride()
    value += 1
    assert not torch.equal(taken["net"]["weight"], value)
    place = taken["net"]["weight"].data_ptr()
    again = copies.take(state)
    assert again["net"]["weight"].data_ptr() == place
    assert torch.equal(again["net"]["weight"], value)
    assert (again["step"], again["none"], again["list"]) == (3, None, [1, 2])
    other = copies.take({"net": {"weight": torch.zeros(5)}})
    assert other["net"]["weight"].shape == (5,)


def test_save_that_a_clock_asks_for_is_taken_once_by_several_ranks() -> None:
    """The flag is read a step late; meanwhile the clock still says so."""
    beats = Beats(SimpleNamespace(count=2, device=torch.device("cpu"), start_max=lambda flags: None))  # type: ignore[arg-type]
    saved, due = [], False
    for step in range(8):
        due = due or step == 3
        if beats.beat(torch.zeros(()), stop=False, save=due).save:
            saved.append(step)
            due = False
    assert saved == [4]


def slow_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until the event is set."""
    go, save = threading.Event(), checkpoint.save

    def waiting(*arguments, **options):  # type: ignore[no-untyped-def]
        assert go.wait(10)
        return save(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", waiting)
    return go


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = slow_writes(monkeypatch)
    value = torch.zeros(3)
    with Saver(tmp_path, ALONE, Saving(), print) as saver:
        saver.save(1, {"value": value}, score=None, must=False)
        value += 1  # training goes on
        assert checkpoint.folders(tmp_path) == []
        go.set()
        saver.settle()
        (path,) = checkpoint.folders(tmp_path)
        found = checkpoint.verify(path)
        assert isinstance(found, checkpoint.Checkpoint)
        assert torch.equal(found.load()["value"], torch.zeros(3))


def test_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy is not overwritten while it is being written."""
    go = slow_writes(monkeypatch)
    with Saver(tmp_path, ALONE, Saving(), print) as saver:
        saver.save(1, {"value": torch.ones(3)}, score=None, must=False)
        threading.Timer(0.2, go.set).start()
        saver.save(2, {"value": torch.full((3,), 2.0)}, score=None, must=False)
    for step in (1, 2):
        found = checkpoint.verify(tmp_path / f"step-{step:08d}")
        assert isinstance(found, checkpoint.Checkpoint)
        assert torch.equal(found.load()["value"], torch.full((3,), float(step)))


def test_preparing_waits_for_a_write_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a stage ends with a save and the next one begins."""
    go = slow_writes(monkeypatch)
    with Saver(tmp_path, ALONE, Saving(), print) as saver:
        saver.save(1, {"value": torch.ones(3)}, score=None, must=False)
        threading.Timer(0.2, go.set).start()
        saver.prepare({"value": torch.full((3,), 2.0)})
    found = checkpoint.verify(tmp_path / "step-00000001")
    assert isinstance(found, checkpoint.Checkpoint)
    assert torch.equal(found.load()["value"], torch.ones(3))


def test_failed_write_is_reported_and_only_a_must_ends_the_run(tmp_path: Path) -> None:
    said: list[str] = []
    with Saver(tmp_path / "there", ALONE, Saving(), said.append) as saver:
        saver.save(1, {"value": torch.ones(3)}, score=None, must=True)
        whole = checkpoint.folders(tmp_path / "there")
        (tmp_path / "there" / "step-00000002.partial").write_text("in the way")
        saver._folder = tmp_path / "there" / "step-00000002.partial"
        saver.save(2, {"value": torch.ones(3)}, score=None, must=False)
        saver.settle()
        assert len(said) == 1
        assert "and the run goes on" in said[0]
        with pytest.raises(UserError, match="earlier ones stand"):
            saver.save(3, {"value": torch.ones(3)}, score=None, must=True)
    assert checkpoint.folders(tmp_path / "there") == whole


def test_minutes_are_counted_from_the_last_save(tmp_path: Path) -> None:
    with Saver(tmp_path, ALONE, Saving(every_minutes=0.2 / 60), print) as saver:
        assert not saver.minutes_are_up
        time.sleep(0.25)
        assert saver.minutes_are_up
        saver.save(1, {}, score=None, must=True)
        assert not saver.minutes_are_up
    with Saver(tmp_path, ALONE, Saving(), print) as saver:
        assert not saver.minutes_are_up
