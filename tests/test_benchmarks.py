"""Every benchmark starts, measures and ends with its line of JSON; what it measures is not looked at here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import REPOSITORY, environment

SHORTLY = {
    "augmentation": ("--rounds", "1", "--batch", "8", "--steps", "2"),
    "checkpoint_stall": ("--steps", "1", "--saves", "1", "--rounds", "1"),
    "communication": ("--backends", "ddp", "zero2"),
    "loading": ("--samples", "1200", "--batch", "16", "--rounds", "1"),
    "resident_epoch": ("--rounds", "1"),
    "sandwich_step": ("--rounds", "1", "--batch", "2", "--size", "64"),
    "skipping": ("--draws", "1"),
    "step_overhead": ("--turns", "1", "--steps", "1", "--small-turns", "1", "--small-steps", "2"),
}


def test_all_benchmarks_are_started_below() -> None:
    assert {script.stem for script in (REPOSITORY / "benchmarks").glob("*.py")} == SHORTLY.keys()


@pytest.mark.soak
@pytest.mark.parametrize("name", SHORTLY)
def test_benchmark_ends_with_a_line_of_json(name: str, image_folder: Path, tmp_path: Path) -> None:
    root = ("--root", str(image_folder)) if name == "loading" else ()
    given = [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *SHORTLY[name], *root]
    done = subprocess.run(given, env=environment(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout.splitlines()[-1]), dict)
