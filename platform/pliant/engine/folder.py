"""A run's folder: what ran, with what, from which commit; and where the rest lies in it.

runs/<name>/<time>/
  experiment.json  recipe.py  environment.json  training.lock
  checkpoints/  log.jsonl  tensorboard/  calibration/  spectrum.json  spectrum.png
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pliant import record
from pliant.aside import written_aside
from pliant.errors import UserError
from pliant.experiment import Experiment

_PACKAGES = (
    *("pliant", "torch", "torchvision", "timm", "numpy", "pillow", "accelerate", "deepspeed"),
    *("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
)


_LOCK = "training.lock"
_NO_LOCKS = (NotImplementedError, OSError, RuntimeError)
"""What a file system without locks, or another user's file, may lead to: the run goes on without one."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run's folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def log(self) -> Path:
        """One JSON object per line: what was logged, in order."""
        return self.path / "log.jsonl"


def create(experiment: Experiment, recipe_file: Path | None) -> RunFolder:
    """A new folder for a run of this experiment.

    Raises:
        UserError: it cannot be made.
    """
    parent = experiment.runs / experiment.name
    started = datetime.now()
    for attempt in range(100):
        # Two runs may start in the same second: whoever makes the folder has it.
        suffix = f"-{attempt}" if attempt else ""
        path = parent / f"{started:%Y%m%d-%H%M%S}{suffix}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"The run's folder {path} cannot be made ({error.strerror}): write another --runs."
            ) from None
        try:
            _describe(experiment, recipe_file, path)
        except OSError as error:
            raise UserError(
                f"Nothing can be written to {path} ({error.strerror}): make room, or write another --runs."
            ) from None
        return RunFolder(path)
    raise UserError(f"{parent} already holds a hundred runs of this second: write another --name.")


def keep_changes(experiment: Experiment, run: RunFolder) -> None:
    """Keeps the settings that a resumed run goes on with, so that what is asked of it later goes by them."""
    with written_aside(run.path / "experiment.json") as beside:
        beside.write_text(record.dump(experiment))


def _describe(experiment: Experiment, recipe_file: Path | None, path: Path) -> None:
    (path / "experiment.json").write_text(record.dump(experiment))
    if recipe_file is not None:
        shutil.copyfile(recipe_file, path / "recipe.py")
    (path / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, machine and commit."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "device": device,
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain")),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def newest(experiment: Experiment) -> RunFolder | None:
    """The newest run of this name that has a checkpoint, or will have as it stops; None if there is none.

    Raises:
        UserError: another process trains in one that has none yet.
    """
    parent = experiment.runs / experiment.name
    runs = sorted(parent.iterdir(), reverse=True) if parent.is_dir() else []
    for path in runs:
        if not _has_checkpoint(path) and (path / _LOCK).exists():
            with alone_in(path):
                pass
        if _has_checkpoint(path):
            return RunFolder(path)
    return None


def _has_checkpoint(path: Path) -> bool:
    return any(path.glob("checkpoints/step-*[0-9]"))


@contextmanager
def alone_in(path: Path, patience: float = 150.0) -> Iterator[None]:
    """One process trains in a run's folder; its end gives the folder back, however it ends.

    One that was stopped may still be at its last step. Where its machine is gone, the file system takes its time to
    give the lock back: NFS one minute and a half.

    Args:
        patience: how long another process is waited for, in seconds.

    Raises:
        UserError: it trains on.
    """
    # A soft lock would outlive the machine of the process that held it.
    lock = FileLock(path / _LOCK, fallback_to_soft=False)
    with suppress(*_NO_LOCKS):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            print(f"Another process is training in {path}: waiting for its end", flush=True)
            _wait(lock, path, patience)
    try:
        yield
    finally:
        with suppress(*_NO_LOCKS):
            lock.release()


def _wait(lock: FileLock, path: Path, patience: float) -> None:
    try:
        lock.acquire(timeout=patience, poll_interval=0.5)
    except Timeout:
        raise UserError(
            f"Another process is training in {path}: stop it first, or leave --resume out to begin a new run."
        ) from None
