"""kill -9 of a rank at random instants; tests/faults.py says how."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import prepare, trial


def test_killed_twice_a_run_ends_the_same(tmp_path: Path) -> None:
    undisturbed = prepare(tmp_path)
    kills = trial(tmp_path / "killed", undisturbed, seed=1, kills=2)
    assert kills.total() >= 1, kills  # a rank may be done before its time comes


@pytest.mark.soak
def test_killed_two_hundred_times(tmp_path: Path) -> None:
    undisturbed = prepare(tmp_path)
    done = 0
    for seed in range(100):
        done += trial(tmp_path / f"run-{seed}", undisturbed, seed, kills=6).total()
        if done >= 200:
            return
    pytest.fail(f"only {done} kills came in time")
