"""DeepSpeed's configuration file, which accelerate names: what of it counts, and what contradicts the experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pliant.errors import UserError

_TUNED = (
    "zero_optimization",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "dump_state",
    "steps_per_print",
)
"""What a user's configuration file may decide: how ZeRO communicates, and what DeepSpeed reports."""
_JUDGED = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "scheduler", "fp16", "bf16", "amp"),
)
"""What the experiment decides: a file that says otherwise is refused."""
_OURS = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
"""What a file may hold, and this module decides."""


def options_for(stage: int, clip: float | None, config: Path | None) -> dict[str, Any]:
    """DeepSpeed's configuration: how it communicates by the user's file, all else by the experiment.

    Raises:
        UserError: the file cannot be read, or decides what the experiment decides.
    """
    given: dict[str, Any] = {} if config is None else read_config(config)
    zero = dict(given.get("zero_optimization", {}))
    if zero.get("stage", stage) not in (stage, "auto"):
        raise UserError(f"{config} asks for ZeRO {zero['stage']}: write --backend zero{zero['stage']}.")
    for name in ("offload_optimizer", "offload_param"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("none", None):
            raise UserError(f"{config} moves state to the {device} ({name}), which is not offered: take it out.")
    for name in ("cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory"):
        if zero.get(name):
            raise UserError(f"{config} moves state to the cpu ({name}), which is not offered: take it out.")
    if stage == 3:
        zero.setdefault("stage3_param_persistence_threshold", 0)
    fixed = {
        "train_micro_batch_size_per_gpu": 1,  # only a count of ours: DeepSpeed never sees a batch
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip or 0.0,  # left out, DeepSpeed clips to 1
        "zero_optimization": {**_settled(zero), "stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    _refuse_contradictions(given, clip, config)
    tuned = {key: value for key, value in given.items() if key in _TUNED and value != "auto"}
    return {"steps_per_print": 2**31} | tuned | fixed


def read_config(path: Path) -> dict[str, Any]:
    """A DeepSpeed configuration file.

    Raises:
        UserError: it is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"DeepSpeed's configuration {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise UserError(f"DeepSpeed's configuration {path} is no JSON: {error}.") from None
    return found


def _settled(zero: dict[str, Any]) -> dict[str, Any]:
    """Without what is left to others to decide: then DeepSpeed's defaults hold."""
    return {key: value for key, value in zero.items() if value != "auto" and not key.startswith("offload_")}


def _refuse_contradictions(given: dict[str, Any], clip: float | None, config: Path | None) -> None:
    for name, value in given.items():
        if name not in (*_TUNED, *_JUDGED, *_OURS) and value not in ("auto", None, False):
            raise UserError(f"{config} sets {name}, which is not offered: take it out.")
    said = given.get("gradient_clipping", "auto")
    if said not in ("auto", clip or 0.0):
        raise UserError(
            f"{config} clips gradients to {said} and the run to {clip}: write --optimization.clip {said}, or "
            '"gradient_clipping": "auto" in the file.'
        )
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if given.get(name, "auto") != "auto":
            raise UserError(f"{config} sets {name}: take it out; --batch.images and --batch.micro decide.")
    for name, instead in {
        "optimizer": "the recipe's optimization settings decide",
        "scheduler": "the recipe's optimization settings decide",
        "fp16": "write --precision fp16",
        "bf16": "write --precision bf16",
        "amp": "write --precision bf16",
    }.items():
        section = given.get(name, {})
        if isinstance(section, dict) and section and section.get("enabled", True) not in (False, "auto"):
            raise UserError(f"{config} has a section {name!r}: take it out; {instead}.")
