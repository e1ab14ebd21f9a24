"""Work that may be stopped at any moment and goes on where it stopped, and shows its result only when that is whole.

A split is written below ROOT/.SPLIT.partial, which readers of ROOT pass over. When it is whole, ROOT/prepared.json says
what it is, and then it is moved into place; so a split is finished if it is both recorded and in its place.
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

from pliant.errors import UserError

RECORD = "prepared.json"


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


def recorded(root: Path) -> dict[str, Any]:
    """What root/prepared.json says, by the name of the work; empty if there is no such file."""
    try:
        found = json.loads((root / RECORD).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise UserError(f"{root / RECORD} cannot be read: remove it together with what it describes.") from None
    return found if isinstance(found, dict) else {}


def record(root: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Write that a piece of work is whole."""
    write_text(root / RECORD, json.dumps(recorded(root) | {name: dict(entry)}, indent=2) + "\n")


def forget(root: Path, name: str) -> None:
    """Take a record back: what it described is gone, and is made anew."""
    entries = recorded(root)
    if entries.pop(name, None) is not None:
        write_text(root / RECORD, json.dumps(entries, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: written beside, flushed to storage, renamed."""
    beside = path.with_name(f"{path.name}.part")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def check_space(folder: Path, needed: int) -> None:
    """Before anything is written.

    Args:
        folder: where the work is written; what it holds already is taken off.
        needed: bytes in all.

    Raises:
        UserError: there is too little room.
    """
    there = sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file()) if folder.is_dir() else 0
    above = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(above).free
    if needed - there > free:
        raise UserError(
            f"{above} has {free / 1e9:,.1f} GB free and {(needed - there) / 1e9:,.1f} GB are needed: make room, or "
            "write another folder as --to."
        )
