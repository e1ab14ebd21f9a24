"""Ranks killed at random instants: the run is resumed, and ends with the weights of the run that was left alone.

    python -m tests.faults --kills 200 --results benchmarks/results/faults.json

Two ranks over gloo train a small US-Net; one of them gets SIGKILL at a random instant, or inside a checkpoint's write,
or in a validation, or in a calibration afterwards. The other one then leaves by itself. After a few kills the run is
brought to its end and compared, bit for bit. Results are appended, so a stopped trial goes on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from pliant.errors import EXIT_RANKS_LOST
from tests.runs import REPOSITORY, Launch, arguments, final_state, listens, only_run, same, tiny_cifar

PLIANT = str(Path(sys.executable).with_name("pliant"))
RECIPE = str(REPOSITORY / "recipes" / "usnet_cifar10.py")
SETTINGS = {
    "optimization__steps": 60,
    "saving__every-steps": 4,
    "evaluate-epochs": 1,
    "optimization__ema": 0.9,
    "timeout-minutes": 0.5,
}
INSTANTS = ("anywhere", "checkpoint", "evaluation", "calibration")
_LONGEST = 120.0
_PATIENCE = 15.0


class Trial:
    """One run that is killed again and again."""

    def __init__(self, folder: Path, undisturbed: Path, generator: random.Random) -> None:
        self.folder, self.undisturbed, self.generator = folder, undisturbed, generator
        self.runs = folder / "runs"
        self.kills: Counter[str] = Counter()

    def train(self) -> Launch:
        given = arguments(self.undisturbed.parents[2] / "data", self.runs, **SETTINGS)
        return Launch([sys.executable, RECIPE, *given, "--resume", "auto"]).start()

    def checkpoints(self) -> Path | None:
        found = sorted(self.runs.glob("*/*/checkpoints"))
        return found[-1] if found else None

    def kill_training(self, instant: str) -> bool:
        """Whether a rank was killed before the run was at its end."""
        before = self._steps()
        pair = self.train()
        wait = {"anywhere": self._at_random, "checkpoint": self._in_a_write, "evaluation": self._in_validation}
        came = wait[instant](pair)
        met = self._steps() > before  # both had joined, and gone a step
        if came and pair.running():
            pair.kill(self.generator.randrange(2))
        ends = pair.finish(_PATIENCE if came else _LONGEST)
        assert not (pair.hung and (met or not came)), f"ranks {pair.hung} hung: {ends}"
        killed = any(status == -signal.SIGKILL for status, _ in ends)  # it may have come to its end just before
        for status, said in ends:
            # The other one leaves by itself, or is at its end; if they had not met yet, its launcher ends it.
            assert status in ((-signal.SIGKILL, EXIT_RANKS_LOST, 0) if killed else (0,)), f"{status}: {said}"
            assert "Traceback" not in said or killed, said
        self.kills[came or instant] += killed
        return killed

    def _at_random(self, pair: Launch) -> str:
        """Within the next steps, counted, since machines differ in speed; now and then before the first of them."""
        before = len(self._logged())
        further = self.generator.randrange(0, 12)
        if self.generator.random() < 0.8:
            self._wait(pair, lambda: all(listens(process.pid) for process in pair.processes))
            self._wait(pair, lambda: len(self._logged()) >= before + further)
        time.sleep(self.generator.uniform(0.0, 0.2))
        return "anywhere"

    def _in_a_write(self, pair: Launch) -> str | None:
        wanted = self.generator.randrange(1, 4)
        seen: set[Path] = set()

        def writing() -> bool:
            seen.update(self.runs.glob("*/*/checkpoints/*.partial"))
            return len(seen) >= wanted

        return "checkpoint" if self._wait(pair, writing, poll=0.0005) else None

    def _in_validation(self, pair: Launch) -> str | None:
        """The step that a validation follows stands in the log; the validation's own line does not yet.

        It is a matter of milliseconds: after two that were missed the rank is killed wherever it is.
        """
        steps = 40 * 5 // 32
        old, before = len(self._logged()), self._validations()

        def validating() -> bool:
            last = json.loads((self._logged()[old:] or ["{}"])[-1])
            return last.get("event") == "step" and last["step"] % steps == 0

        def missed() -> bool:
            return self._validations() >= before + 2

        if not self._wait(pair, lambda: validating() or missed(), poll=0.001):
            return None
        return "anywhere" if missed() else "evaluation"

    def _logged(self) -> list[str]:
        """The log's whole lines."""
        lines = [line for log in self.runs.glob("*/*/log.jsonl") for line in log.read_text().splitlines()]
        return [line for line in lines if line.endswith("}")]

    def _steps(self) -> int:
        return sum('"event": "step"' in line for line in self._logged())

    def _validations(self) -> int:
        return sum('"event": "val"' in line for line in self._logged())

    def _wait(self, pair: Launch, condition: Callable[[], bool], poll: float = 0.01) -> bool:
        began = time.monotonic()
        while pair.running() and time.monotonic() - began < _LONGEST:
            if condition():
                return True
            time.sleep(poll)
        return False

    def finish(self) -> Path:
        """The run, brought to its end."""
        for status, said in self.train().finish():
            assert status == 0, said
        newest = max(path.parent for path in self.runs.glob("*/*/checkpoints"))
        assert_equal(newest, self.undisturbed)
        return newest

    def kill_calibration(self, run: Path) -> None:
        """Killed on the way, it leaves whole statistics or none; asked again, it gives those of the other run."""
        command = [PLIANT, "calibrate", str(run), "--at", "0.35", "0.7", "1.0"]
        pair = Launch(command).start()
        if self._wait(pair, lambda: all(listens(process.pid) for process in pair.processes)):
            time.sleep(self.generator.uniform(0.0, 0.6))
        if pair.running():
            pair.kill(self.generator.randrange(2))
            self.kills["calibration"] += 1
        pair.finish(_PATIENCE)
        for status, said in Launch(command).start().finish():
            assert status == 0, said
        mine, other = (sorted((one / "calibration").rglob("*.safetensors")) for one in (run, self.undisturbed))
        assert [path.name for path in mine] == [path.name for path in other]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(mine, other, strict=True))


def assert_equal(run: Path, undisturbed: Path) -> None:
    """Weights, statistics, averages and optimizer, bit for bit."""
    one, two = final_state(run), final_state(undisturbed)
    for name in ("net", "rows", "ema", "ema_rows", "optimizer", "precision"):
        assert same(one[name], two[name]), f"{name} of {run} is not that of the run that was left alone"


def prepare(folder: Path) -> Path:
    """The run that is left alone, with its calibration."""
    tiny_cifar(folder / "data")
    runs = folder / "undisturbed"
    given = arguments(folder / "data", runs, **SETTINGS)
    for status, said in Launch([sys.executable, RECIPE, *given]).start().finish():
        assert status == 0, said
    run = only_run(runs)
    command = [PLIANT, "calibrate", str(run), "--at", "0.35", "0.7", "1.0"]
    for status, said in Launch(command).start().finish():
        assert status == 0, said
    return run


def trial(folder: Path, undisturbed: Path, seed: int, kills: int) -> Counter[str]:
    """Some kills, the last in a calibration, then the comparison; how many there were of each kind."""
    generator = random.Random(seed)
    one = Trial(folder, undisturbed, generator)
    instants = [INSTANTS[(seed + number) % 3] for number in range(kills - 1)]
    for instant in instants:
        one.kill_training(instant)
    one.kill_calibration(one.finish())
    return one.kills


@dataclass(frozen=True)
class Settings:
    """How much is tried."""

    kills: int = 200
    kills_per_run: int = 6
    results: Path | None = None
    """JSON file that results are added to, and that an earlier trial's kills are read from."""


def main(settings: Settings) -> None:
    results = {"benchmark": "faults", "kills": 0, "runs": 0, "failed": [], "instants": {}, "seconds": 0.0}
    if settings.results is not None and settings.results.is_file():
        results = json.loads(settings.results.read_text())
    results |= {"ranks": 2, "steps": SETTINGS["optimization__steps"], "torch": torch.__version__}
    instants: Counter[str] = Counter(results["instants"])
    with tempfile.TemporaryDirectory() as name:
        undisturbed = prepare(Path(name))
        while instants.total() < settings.kills:
            began, seed = time.monotonic(), int(results["runs"])
            try:
                instants += trial(Path(name) / f"run-{seed}", undisturbed, seed, settings.kills_per_run)
            except AssertionError as error:
                results["failed"].append({"seed": seed, "what": str(error)[:500]})
            results["seconds"] += round(time.monotonic() - began, 1)
            results |= {"runs": seed + 1, "instants": dict(instants), "kills": instants.total()}
            if settings.results is not None:
                settings.results.parent.mkdir(parents=True, exist_ok=True)
                partial = settings.results.with_suffix(".partial")
                partial.write_text(json.dumps(results, indent=2) + "\n")
                os.replace(partial, settings.results)
    print(json.dumps(results))
    sys.exit(bool(results["failed"]))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
