"""Checkpoints that are whole or absent.

A checkpoint is a folder `step-00012000` with its state and a manifest of sizes and SHA-256 sums. It is written under
another name, flushed to the disk and renamed; it is verified before it is loaded; a damaged one is named, and the one
before it is used. Loading runs no code of the file (`weights_only`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.serialization import config

from pliant.errors import UserError

_STATE = "state.pt"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint."""

    path: Path
    step: int
    """Optimizer steps done, over all stages."""
    score: float | None
    """The recipe's score on the held-out split, if it was evaluated here."""
    lasting: bool = False
    """Whether it stays, however many newer ones there are: the end of a stage."""

    def load(self) -> dict[str, Any]:
        """The state, on the CPU."""
        state: dict[str, Any] = torch.load(self.path / _STATE, map_location="cpu", weights_only=True)
        return state


def save(
    folder: Path, step: int, state: dict[str, Any], *, score: float | None, keep: int, lasting: bool = False
) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep` up to it, the best and the lasting.

    A run goes on from its newest whole checkpoint: one of a later step is damaged, and makes place too.

    Args:
        folder: of all checkpoints of the run; made if missing.
        state: tensors and plain values only.
        lasting: it stays until the run's folder goes.

    Raises:
        OSError: it could not be written; then nothing is left of it, and the others stand.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}"
    partial = folder / f"{path.name}.partial"
    for left in (*folder.glob("step-*.partial"), *folder.glob("step-*.removed")):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir()
        with _Flushed(partial / _STATE) as file:
            _save(state, file)
        body = {"step": step, "score": score, "lasting": lasting, "files": {_STATE: file.entry}}
        with _Flushed(partial / _MANIFEST) as manifest:
            manifest.write(json.dumps({**body, "sha256": _digest(body)}, indent=2).encode())
        _flush_folder(partial)
        replaced = _aside(path)  # the same step again, after a resume from an earlier one: equal, or damaged
        partial.rename(path)
        _flush_folder(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _thin(folder, keep, path)
    return path


def verify(path: Path, *, contents: bool = True) -> Checkpoint | str:
    """The checkpoint in a folder, if it is whole; else what is wrong with it.

    Args:
        contents: read every byte; else the manifest and the files' sizes alone.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        digest = manifest.pop("sha256")
        if digest != _digest(manifest):
            return f"{path / _MANIFEST} is damaged: its checksum does not match"
        for name, entry in manifest["files"].items():
            file = path / name
            if file.stat().st_size != entry["bytes"]:
                return f"{file} is damaged: it has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if not contents:
                continue
            with file.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry["sha256"]:
                    return f"{file} is damaged: its checksum does not match"
        return Checkpoint(path, int(manifest["step"]), manifest["score"], bool(manifest.get("lasting")))
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path / _MANIFEST} is damaged: it is no manifest"


def folders(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first, whole or damaged."""
    return sorted(path for path in folder.glob("step-*") if path.suffix == "" and path.is_dir())


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; each damaged one is stepped over with a warning that names the file."""
    for path in reversed(folders(folder)):
        found = verify(path)
        if isinstance(found, Checkpoint):
            return found
        warnings.warn(f"{found}; it is stepped over.", stacklevel=2)
    return None


def best(folder: Path) -> Checkpoint | None:
    """The whole checkpoint with the highest score, the earliest of equals; None if none has a score."""
    scored = [
        found for path in folders(folder) if isinstance(found := verify(path), Checkpoint) and found.score is not None
    ]
    return max(scored, key=lambda found: (found.score or 0.0, -found.step), default=None)


def require(folder: Path, which: str) -> Checkpoint:
    """The `newest` or the `best` checkpoint of a run, or the one of the step that `which` counts.

    Raises:
        UserError: there is none, or `which` is none of the three.
    """
    if which not in ("newest", "best"):
        return _of_step(folder, which)
    found = best(folder) if which == "best" else newest(folder)
    if found is None:
        what = "with a score on a held-out split" if which == "best" else "that is whole"
        raise UserError(f"{folder} holds no checkpoint {what}: train first, or write the folder of another run.")
    return found


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Loads a network's own weights.

    Raises:
        UserError: they are another network's; the sentence names the first difference.
    """
    expected = net.state_dict()
    for name in expected | dict(weights):
        there = tuple(weights[name].shape) if name in weights else "missing"
        here = tuple(expected[name].shape) if name in expected else "missing"
        if there != here:
            raise UserError(
                f"{source} holds another network: {name} is {there} there and {here} in this recipe's network. Write "
                "the recipe, classes and network settings that it was trained with."
            )
    net.load_state_dict(dict(weights))


def _of_step(folder: Path, step: str) -> Checkpoint:
    paths = {str(int(path.name.removeprefix("step-"))): path for path in folders(folder)}
    if step not in paths:
        raise UserError(
            f"{folder} holds no checkpoint of step {step}: write --checkpoint with newest, best or one of "
            f"{', '.join(paths) or 'none'}."
        )
    found = verify(paths[step])
    if isinstance(found, str):
        raise UserError(f"{found}: write another --checkpoint.")
    return found


def _thin(folder: Path, keep: int, written: Path) -> None:
    there = folders(folder)
    paths = [path for path in there if path <= written]
    said = {path: _said(path) for path in paths}
    kept = {*paths[-keep:], *(path for path in paths if said[path].get("lasting"))}
    scores = {path: float(score) for path in paths if (score := said[path].get("score")) is not None}
    for path in sorted(scores, key=lambda path: (-scores[path], path)):
        if path in kept or isinstance(verify(path), Checkpoint):  # a damaged one is not worth a whole one's place
            kept.add(path)
            break
    for path in there:
        if path not in kept:
            shutil.rmtree(_aside(path), ignore_errors=True)


def _said(path: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says, unverified; nothing if it cannot be read."""
    try:
        said = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _aside(path: Path) -> Path:
    """Where a folder goes, if it is there, before it is removed: half-way it does not look like a checkpoint."""
    doomed = path.with_name(f"{path.name}.removed")
    if path.exists():
        path.rename(doomed)
    return doomed


def _save(state: dict[str, Any], file: _Flushed) -> None:
    try:
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined] # SHA-256 says more
            torch.save(state, file)  # type: ignore[arg-type] # it only writes
    except Exception:
        if file.problem is not None:  # torch hides it behind one of its own
            raise file.problem from None
        raise


class _Flushed(io.RawIOBase):
    """A new file that counts and hashes what is written to it, and is on the disk when it is closed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._hash = hashlib.sha256()
        self._bytes = 0
        self.problem: OSError | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._bytes += len(view)
        written = 0
        try:
            while written < len(view):  # a raw write may be short
                written += self._file.write(view[written:])
        except OSError as error:
            self.problem = error
            raise
        return written

    def __exit__(self, *stopped: Any) -> None:
        if not any(stopped):
            os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        self._file.close()
        super().close()


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
