"""What the launcher was told that concerns the experiment: accelerate's precision and DeepSpeed file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from pliant.errors import UserError
from pliant.experiment import BackendName, Experiment, Precision


def honoured(experiment: Experiment, environment: Mapping[str, str] | None = None) -> Experiment:
    """The experiment with what `accelerate launch` or `accelerate config` asked for in its place.

    Raises:
        UserError: the launcher and the experiment contradict each other.
    """
    env = os.environ if environment is None else environment
    return _with_backend(_with_precision(experiment, env), env)


def _with_precision(experiment: Experiment, env: Mapping[str, str]) -> Experiment:
    asked = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked in ("no", "", experiment.precision):
        return experiment
    if asked not in ("bf16", "fp16") or experiment.precision != "fp32":
        raise UserError(
            f"accelerate launch asks for {asked} and the experiment for {experiment.precision}: write the same in "
            "--mixed_precision and --precision; there are bf16 and fp16."
        )
    return dataclasses.replace(experiment, precision=cast(Precision, asked))


def _with_backend(experiment: Experiment, env: Mapping[str, str]) -> Experiment:
    if env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() not in ("true", "1"):
        return experiment
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    config = experiment.deepspeed_config or (Path(file) if file and file != "none" else None)
    stage = _stage(config, env)
    if experiment.backend not in ("auto", f"zero{stage}"):
        raise UserError(
            f"accelerate launch asks for DeepSpeed's ZeRO {stage} and the experiment for --backend "
            f"{experiment.backend}: leave --backend out, or launch without --use_deepspeed."
        )
    return dataclasses.replace(experiment, backend=cast(BackendName, f"zero{stage}"), deepspeed_config=config)


def _stage(config: Path | None, env: Mapping[str, str]) -> int:
    stage: object = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if config is not None:
        from pliant.engine.backends.zero import read_config

        stage = read_config(config).get("zero_optimization", {}).get("stage", 0)
    if str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"There is no ZeRO {stage}: write a stage from 0 to 3 ({config or 'accelerate config'}).")
    return int(str(stage))
