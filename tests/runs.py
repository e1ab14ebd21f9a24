"""Small runs for tests: a dataset in CIFAR's form, and recipe files started as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).parents[1]


def tiny_cifar(root: Path, images: int = 40) -> Path:
    """Random images in the layout of CIFAR-10's binary files, `images` in each of the five training files."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        labels = (np.arange(images) % 10).astype(np.uint8)[:, None]
        pixels = generator.integers(0, 256, (images, 3072), dtype=np.uint8)
        # A class shows in its brightness, so that a loss can fall.
        pixels = (pixels // 2 + 12 * labels).astype(np.uint8)
        (folder / name).write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())
    return root


def arguments(data: Path, runs: Path, **settings: object) -> list[str]:
    """The command line of a tiny run of recipes/usnet_cifar10.py; settings by dotted name with __ for the dots."""
    asked: dict[str, object] = {
        "data.root": data,
        "runs": runs,
        "recipe.network.full": 0.25,
        "recipe.network.stem-stride": 2,
        "recipe.network.late-stride": 2,
        "batch.images": 32,
        "batch.micro": 8,
        "optimization.steps": 12,
        "optimization.warmup-epochs": 0,
        "calibration.images": 64,
        "calibration.batch": 16,
        "threads": 1,
        "log-steps": 1,
    }
    asked |= {name.replace("__", "."): value for name, value in settings.items()}
    return [text for name, value in asked.items() for text in (f"--{name}", str(value))]


def command(*given: str, recipe: str = "usnet_cifar10") -> list[str]:
    """How a user starts a recipe file, with this interpreter."""
    return [sys.executable, str(REPOSITORY / "recipes" / f"{recipe}.py"), *given]


def environment() -> dict[str, str]:
    """One thread per rank, as torchrun sets it."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def finish(given: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return subprocess.run(given, env=environment(), capture_output=True, text=True, timeout=300, check=False)


@dataclass
class Launch:
    """Ranks of one command, started without a launcher that would end all of them with one."""

    command: Sequence[str]
    ranks: int = 2
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    hung: list[int] = field(default_factory=list)
    """Ranks that `finish` had to kill."""

    def start(self) -> Launch:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        count = str(self.ranks)
        for rank in map(str, range(self.ranks)):
            env = environment() | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.processes.append(
                subprocess.Popen(list(self.command), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        return self

    def finish(self, patience: float = 120.0) -> list[tuple[int, str]]:
        """Exit status and words of each; what still runs after `patience` seconds is killed, as a launcher would."""
        ends = time.monotonic() + patience
        while time.monotonic() < ends and any(process.poll() is None for process in self.processes):
            time.sleep(0.02)
        self.hung = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
        self.kill_all()
        done = []
        for process in self.processes:
            said, complaints = process.communicate()
            done.append((process.returncode, said + complaints))
        return done

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def kill_all(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()

    def kill(self, rank: int) -> None:
        self.processes[rank].send_signal(signal.SIGKILL)


def listens(pid: int) -> bool:
    """Whether a process catches SIGUSR1, which it does once it heeds signals; false if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    (caught,) = [line.split()[1] for line in lines if line.startswith("SigCgt")]
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def only_run(runs: Path) -> Path:
    """The one run below a folder of runs."""
    (found,) = [path for path in runs.glob("*/*") if path.is_dir()]
    return found


def final_state(run: Path) -> dict[str, object]:
    """The newest checkpoint's state."""
    newest = max(path for path in (run / "checkpoints").iterdir() if path.suffix == "")
    return torch.load(newest / "state.pt", weights_only=True)


def logged(run: Path, event: str) -> list[dict[str, Any]]:
    """The lines of the log of one kind; one that is being written is not there yet."""
    whole, _, _ = (run / "log.jsonl").read_text().rpartition("\n")
    return [line for line in map(json.loads, whole.splitlines()) if line["event"] == event]


def begun_at(run: Path) -> list[int]:
    """The steps at which a run was begun, and gone on with."""
    return [line["step"] for line in logged(run, "start")]


def losses(run: Path) -> list[dict[str, float]]:
    """The losses of each logged step, by pass; a step that was taken twice counts once, the last time."""
    by_step = {line["step"]: line["losses"] for line in logged(run, "step")}
    return [by_step[step] for step in sorted(by_step)]


def same(left: object, right: object) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    return left == right
