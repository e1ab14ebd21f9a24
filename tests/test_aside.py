"""Files that are in their place whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pliant.aside import written_aside


@pytest.mark.parametrize("flush", [False, True])
def test_what_is_written_takes_the_place_of_what_was_there(flush: bool, tmp_path: Path) -> None:
    path = tmp_path / "spectrum.json"
    for content in ("old", "new"):
        with written_aside(path, flush=flush) as beside:
            assert beside.suffix == ".json"
            beside.write_text(content)
            assert not path.exists() or path.read_text() == "old"
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_two_who_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "spectrum.json"
    with written_aside(path, contended=True) as one, written_aside(path, contended=True) as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other and {one.suffix, other.suffix} == {".json"}
    assert path.read_text() == "one", "whole, of who was done last"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_what_fails_on_the_way_leaves_what_was_there(stop: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "spectrum.json"
    path.write_text("old")

    def write() -> None:
        with written_aside(path) as beside:
            beside.write_text("ne")
            raise stop

    with pytest.raises(stop):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
