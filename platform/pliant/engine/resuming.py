"""Which settings may change when a run is resumed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from pliant.errors import UserError
from pliant.experiment import Experiment

RESUME_RULES: dict[str, Literal["free", "warned"]] = {
    # Everything not named is fixed: a run that is resumed with another value of it is refused.
    "data.root": "warned",
    "data.loader": "warned",
    "data.check": "warned",
    "data.broken_share": "free",
    "data.threads": "free",
    "data.prefetch": "free",
    "calibration": "free",
    "saving": "free",
    "compile": "warned",
    "threads": "free",
    "backend": "warned",
    "deepspeed_config": "warned",
    "verify_gradients": "free",
    "timeout_minutes": "free",
    "ranks": "free",
    "runs": "free",
    "resume": "free",
    "evaluate_epochs": "free",
    "log_steps": "free",
}
"""What may change when a run is resumed: `free` silently, `warned` with a line in the log."""


def differences(old: Experiment, new: Experiment) -> dict[str, tuple[object, object]]:
    """Fields that differ, by dotted name, with the old and the new value."""

    def flatten(value: object, prefix: str) -> dict[str, object]:
        if not dataclasses.is_dataclass(value):
            return {prefix: value}
        flat: dict[str, object] = {f"{prefix}.type": type(value).__name__} if prefix else {}
        for item in dataclasses.fields(value):
            flat |= flatten(getattr(value, item.name), f"{prefix}.{item.name}" if prefix else item.name)
        return flat

    before, after = flatten(old, ""), flatten(new, "")
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return {name: (before.get(name), after.get(name)) for name in names}


def rule_on_resume(name: str, *values: object) -> Literal["fixed", "free", "warned"]:
    """The rule for the setting with this dotted name, which has had these values."""
    for prefix, rule in RESUME_RULES.items():
        if name == prefix or name.startswith(prefix + "."):
            return rule
    # The file of weights may lie elsewhere now: the run has long read it.
    moved = name == "recipe.pretrained" and bool(values) and None not in values
    return "free" if moved else "fixed"


def changes(begun: Experiment, asked: Experiment, run: Path) -> list[str]:
    """What to say of the settings that a run goes on with, and was not begun with.

    Raises:
        UserError: one that may not change.
    """
    changed = differences(begun, asked)
    rules = {name: rule_on_resume(name, *values) for name, values in changed.items()}
    fixed = [f"{name} was {old} and is {new}" for name, (old, new) in changed.items() if rules[name] == "fixed"]
    if fixed:
        raise UserError(
            f"{run} was begun with other settings: {'; '.join(fixed)}. Write the old ones, or leave --resume out."
        )
    return [
        f"{name} was {old} and is {new} from here on."
        for name, (old, new) in changed.items()
        if rules[name] == "warned"
    ]
