"""How much of a machine is this process's."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has where a job was given a part of it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
