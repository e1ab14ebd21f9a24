"""How this process was launched: what accelerate was told of the experiment, and the command that goes on."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
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
    _refuse_unserved(experiment, env)
    known = _with_backend(_with_precision(experiment, env), env)
    if known.deepspeed_config is not None and not known.backend.startswith("zero"):
        raise UserError(
            f"--backend {known.backend} has no use for --deepspeed-config: write --backend zero0 to zero3, or leave "
            "the file out."
        )
    return known


def _refuse_unserved(experiment: Experiment, env: Mapping[str, str]) -> None:
    """What `accelerate config` may hold that would be dropped without a word."""
    if _is_on(env, "ACCELERATE_USE_FSDP"):
        raise UserError("FSDP is not offered: launch without it, and write --backend zero3 for shared-out weights.")
    clip = env.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower()
    if clip not in ("none", "", "0", "0.0", "auto") and (experiment.optimization.clip or 0.0) != float(clip):
        raise UserError(
            f"accelerate launch asks to clip gradients to {clip} and the experiment for "
            f"{experiment.optimization.clip}: write --optimization.clip {clip}, or take it out of accelerate's config."
        )
    if env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1").lower() not in ("1", "auto"):
        raise UserError(
            "accelerate launch asks for gradient accumulation: take it out of accelerate's config; --batch.images and "
            "--batch.micro decide."
        )
    for what in ("OPTIMIZER", "PARAM"):
        device = env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower()
        if device not in ("none", ""):
            raise UserError(
                f"accelerate launch asks to move state to the {device} (offload_{what.lower()}_device), which is not "
                "offered: take it out of accelerate's config."
            )


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
    if not _is_on(env, "ACCELERATE_USE_DEEPSPEED"):
        return experiment
    file = _deepspeed_file(env)
    config = experiment.deepspeed_config or (Path(file) if file else None)
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
        from pliant.engine.backends.deepspeed_file import read_config

        stage = read_config(config).get("zero_optimization", {}).get("stage", 0)
    if str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"There is no ZeRO {stage}: write a stage from 0 to 3 ({config or 'accelerate config'}).")
    return int(str(stage))


def _is_on(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "false").lower() in ("true", "1")


def _deepspeed_file(env: Mapping[str, str]) -> str:
    """The configuration file that accelerate names; empty if none."""
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    return "" if file == "none" else file


def again(arguments: Sequence[str], run: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
    """The command that goes on with the one that was stopped.

    Args:
        arguments: its own, as in sys.argv.
        run: the folder of the training that it was; None for another command, which is given once more.
        environment: of the launcher; default: this process's.
    """
    env = os.environ if environment is None else environment
    script = ["pliant"] if Path(arguments[0]).name == "pliant" else [arguments[0]]
    if run is None:
        words = [program("pliant")] if script == ["pliant"] else [program("python"), *script]
        return shlex.join([*words, *arguments[1:]])
    kept = [text for text in arguments[1:] if not text.startswith("--resume=")]
    if "--resume" in kept:
        place = kept.index("--resume")
        del kept[place : place + 2]
    launcher = _launcher(env)
    if launcher is None:
        return f"the launch that it came from, and --resume {shlex.quote(str(run))}"
    if script == ["pliant"]:
        script = [str(Path(sys.executable).with_name("pliant")) if launcher else program("pliant")]
    elif not launcher:
        script = [program("python"), *script]
    return shlex.join([*launcher, *script, *kept, "--resume", str(run)])


def program(name: str) -> str:
    """How a shell in this folder calls a program of this environment: by its name where that finds it."""
    own, found = Path(sys.executable).with_name(name), shutil.which(name)
    if name == "python" and not own.exists():
        own = Path(sys.executable)
    if not own.exists() or (found is not None and Path(found).absolute() == own.absolute()):
        return name
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)


def _launcher(env: Mapping[str, str]) -> list[str] | None:
    """Its words before the script; none of them where there was none. None: more than this process can know of."""
    ranks = env.get("WORLD_SIZE", "1")
    if env.get("LOCAL_WORLD_SIZE", ranks) != ranks:
        return None
    if "ACCELERATE_MIXED_PRECISION" in env:
        deepspeed = _deepspeed(env)
        several = ["--multi_gpu"] if ranks != "1" and not deepspeed else []  # accelerate takes one of the two
        words = [program("accelerate"), "launch", *several, "--num_processes", ranks]
        if env["ACCELERATE_MIXED_PRECISION"] not in ("no", ""):
            words += ["--mixed_precision", env["ACCELERATE_MIXED_PRECISION"]]
        return [*words, *deepspeed]
    if ranks == "1":
        return []
    return [program("torchrun"), "--nproc_per_node", ranks] if "TORCHELASTIC_RUN_ID" in env else None


def _deepspeed(env: Mapping[str, str]) -> list[str]:
    if not _is_on(env, "ACCELERATE_USE_DEEPSPEED"):
        return []
    file = _deepspeed_file(env)
    if file:
        return ["--use_deepspeed", "--deepspeed_config_file", file]
    return ["--use_deepspeed", "--zero_stage", env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")]
