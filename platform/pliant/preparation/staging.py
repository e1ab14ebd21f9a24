"""Work that may be stopped at any moment and goes on where it stopped, and shows its result only when that is whole.

A split is written below ROOT/.SPLIT.partial, which readers of ROOT pass over. When it is whole,
ROOT/prepared-SPLIT.json says what it is, and then it is moved into place; so a split is finished if it is both recorded
and in its place. A folder is moved in one step, and no reader sees a part of it. Shards are moved one by one, the
highest number first and 000000 last: whoever reads meanwhile, or after a stop at that moment, finds the first missing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pliant.aside import written_aside
from pliant.errors import UserError

_DISK_BLOCK = 512  # bytes, the unit of st_blocks whatever the file system's own is


@contextmanager
def staging(root: Path, name: str, settings: Mapping[str, Any]) -> Iterator[Path]:
    """A folder for unfinished work, this process's alone while the block runs; kept if the block does not end.

    Args:
        root: where the result will lie; made if it is not there.
        name: of the work.
        settings: what was asked for. Work begun with other settings is not mixed with this.

    Raises:
        UserError: another process works there, or what lies there was begun with other settings, or nothing can be
            written.
    """
    folder = root / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"Nothing can be written in {root} ({error.strerror}): write another folder as --to.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process prepares {name} in {root}: wait for it.") from None
        kept, asked = folder / "settings.json", json.dumps(settings, sort_keys=True)
        if kept.is_file() and kept.read_text() != asked:
            raise UserError(
                f"{folder} holds unfinished work with other settings: finish it with the command that began it, or "
                "remove that folder."
            )
        try:
            yield folder
        finally:
            with suppress(OSError):
                if os.listdir(folder) == ["lock"]:  # nothing was begun
                    (folder / "lock").unlink()
                    folder.rmdir()
                    root.rmdir()  # if there is nothing else in it


def begin(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder in a staging folder that the result is written to; from here on the work can be taken up again."""
    write_text(folder / "settings.json", json.dumps(settings, sort_keys=True))
    content = folder / "content"
    content.mkdir(exist_ok=True)
    return content


def discard(root: Path, name: str) -> None:
    """Remove what is left of work that is done."""
    shutil.rmtree(root / f".{name}.partial", ignore_errors=True)


def recorded(root: Path, name: str) -> dict[str, Any]:
    """What is recorded of a piece of work; empty if nothing is.

    Raises:
        UserError: the record cannot be read.
    """
    path = _record(root, name)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} cannot be read: remove it together with what it describes.")
    return found


def record(root: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Write that a piece of work is whole."""
    write_text(_record(root, name), json.dumps(entry, indent=2) + "\n")


def forget(root: Path, name: str) -> None:
    """Take a record back: what it described is gone, and is made anew."""
    _record(root, name).unlink(missing_ok=True)


def _record(root: Path, name: str) -> Path:
    return root / f"prepared-{name}.json"


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, a power failure included."""
    with written_aside(path, flush=True) as beside:
        beside.write_text(text, encoding="utf-8")


def check_space(folder: Path, needed: int) -> None:
    """Before anything is written.

    Args:
        folder: where the work is written; what it holds already is taken off.
        needed: bytes in all.

    Raises:
        UserError: there is too little room.
    """
    there = sum(path.stat().st_blocks * _DISK_BLOCK for path in folder.rglob("*"))
    above = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(above).free
    if needed - there > free:
        raise UserError(
            f"{above} has {free / 1e9:,.1f} GB free and {(needed - there) / 1e9:,.1f} GB are needed: make room, or "
            "write another folder as --to."
        )
