"""What accelerate's launcher and DeepSpeed's configuration file ask for takes effect, or is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from pliant.engine.backends.deepspeed_file import options_for
from pliant.engine.launch import again, honoured
from pliant.errors import UserError
from pliant.experiment import Experiment
from tests.small_recipes import Plain

PLAIN = Experiment(name="plain", recipe=Plain())


def config(folder: Path, **content: object) -> Path:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(content))
    return path


def test_precision_of_accelerate_is_taken() -> None:
    assert honoured(PLAIN, {"ACCELERATE_MIXED_PRECISION": "bf16"}).precision == "bf16"
    assert honoured(PLAIN, {"ACCELERATE_MIXED_PRECISION": "no"}) == PLAIN
    assert honoured(PLAIN, {}) == PLAIN
    own = dataclasses.replace(PLAIN, precision="fp16")
    assert honoured(own, {"ACCELERATE_MIXED_PRECISION": "no"}).precision == "fp16"
    with pytest.raises(UserError, match="asks for bf16 and the experiment for fp16"):
        honoured(own, {"ACCELERATE_MIXED_PRECISION": "bf16"})
    with pytest.raises(UserError, match="there are bf16 and fp16"):
        honoured(PLAIN, {"ACCELERATE_MIXED_PRECISION": "fp8"})


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_file_of_accelerate_is_taken(tmp_path: Path, stage: int) -> None:
    path = config(tmp_path, zero_optimization={"stage": stage})
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    got = honoured(PLAIN, env)
    assert (got.backend, got.deepspeed_config) == (f"zero{stage}", path)
    with pytest.raises(UserError, match=f"asks for DeepSpeed's ZeRO {stage} and the experiment for --backend ddp"):
        honoured(dataclasses.replace(PLAIN, backend="ddp"), env)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP is not offered"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "write --optimization.clip 1.0"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--batch.images and --batch.micro decide"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "move state to the cpu"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "move state to the nvme"),
    ],
)
def test_what_accelerate_asks_for_and_is_not_served_is_refused(env: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        honoured(PLAIN, env)


def test_what_accelerate_asks_for_and_the_run_does_is_served() -> None:
    clipped = dataclasses.replace(PLAIN, optimization=dataclasses.replace(PLAIN.optimization, clip=1.0))
    assert honoured(clipped, {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}) == clipped
    usual = {"ACCELERATE_GRADIENT_CLIPPING": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}
    assert honoured(PLAIN, usual | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}) == PLAIN


def test_stage_of_accelerate_without_a_file() -> None:
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert honoured(PLAIN, env).backend == "zero3"
    with pytest.raises(UserError, match="There is no ZeRO 7"):
        honoured(PLAIN, env | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "7"})


RUN = Path("runs/plain/TIME")
TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("arguments", "env", "expected"),
    [
        (["recipes/a.py", "--seed", "1"], {}, f"python recipes/a.py --seed 1 --resume {RUN}"),
        (["recipes/a.py", "--resume", "auto", "--seed=1"], {}, f"python recipes/a.py --seed=1 --resume {RUN}"),
        (["recipes/a.py", "--resume=auto"], TWO, f"torchrun --nproc_per_node 2 recipes/a.py --resume {RUN}"),
        (["/bin/pliant", "train", "a.py"], {}, f"pliant train a.py --resume {RUN}"),
        (
            ["a.py"],
            TWO | {"ACCELERATE_MIXED_PRECISION": "no"},
            f"accelerate launch --multi_gpu --num_processes 2 a.py --resume {RUN}",
        ),
        (
            ["a.py"],
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            f"accelerate launch --num_processes 1 --mixed_precision bf16 a.py --resume {RUN}",
        ),
        (
            ["a.py"],
            TWO
            | {
                "ACCELERATE_MIXED_PRECISION": "no",
                "ACCELERATE_USE_DEEPSPEED": "true",
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            },
            f"accelerate launch --num_processes 2 --use_deepspeed --zero_stage 3 a.py --resume {RUN}",
        ),
        (["a.py"], TWO | {"WORLD_SIZE": "16"}, f"the launch that it came from, and --resume {RUN}"),
        (["a.py"], {"WORLD_SIZE": "2", "SLURM_PROCID": "0"}, f"the launch that it came from, and --resume {RUN}"),
    ],
)
def test_command_that_goes_on_is_launched_as_the_run_was(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], env: dict[str, str], expected: str
) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert again(arguments, RUN, env) == expected


def test_programs_are_called_by_their_path_where_the_shell_would_find_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`make train` runs .venv/bin/python in a shell that knows nothing of it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place = Path(sys.executable).parent
    assert again(["a.py"], RUN, {}) == f"{place / 'python'} a.py --resume {RUN}"
    monkeypatch.chdir(place.parent)
    assert again(["a.py"], RUN, {}) == f"{place.name}/python a.py --resume {RUN}"
    assert again(["/x/pliant", "spectrum", "RUN"], None, {}) == f"{place.name}/pliant spectrum RUN"
    assert again(["recipes/a.py", "--seed", "1"], None, {}) == f"{place.name}/python recipes/a.py --seed 1"


def test_clipping_is_always_written_out(tmp_path: Path) -> None:
    """Left out, DeepSpeed clips to 1."""
    assert options_for(2, None, None)["gradient_clipping"] == 0.0
    assert options_for(2, 0.5, None)["gradient_clipping"] == 0.5
    agreeing = config(tmp_path, gradient_clipping=0.5, zero_optimization={"stage": 2, "reduce_bucket_size": 1000})
    options = options_for(2, 0.5, agreeing)
    assert options["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    with pytest.raises(UserError, match=r"clips gradients to 0.5 and the run to None: write --optimization.clip 0.5"):
        options_for(2, None, agreeing)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"bf16": {"enabled": True}}, "write --precision bf16"),
        ({"fp16": {"enabled": True}}, "write --precision fp16"),
        ({"optimizer": {"type": "AdamW"}}, "the recipe's optimization settings decide"),
        ({"train_micro_batch_size_per_gpu": 32}, "--batch.images and --batch.micro decide"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "is not offered: take it out"),
        ({"zero_optimization": {"cpu_offload": True}}, "is not offered: take it out"),
        ({"zero_optimization": {"stage": 3}}, "asks for ZeRO 3: write --backend zero3"),
        ({"torch_autocast": {"enabled": True}}, "sets torch_autocast, which is not offered"),
        ({"communication_data_type": "fp16"}, "sets communication_data_type, which is not offered"),
    ],
)
def test_what_the_experiment_decides_is_refused_in_the_file(
    tmp_path: Path, content: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        options_for(2, None, config(tmp_path, **content))


def test_what_accelerate_leaves_open_is_no_contradiction(tmp_path: Path) -> None:
    """As `accelerate config` writes it."""
    path = config(
        tmp_path,
        train_batch_size="auto",
        train_micro_batch_size_per_gpu="auto",
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        bf16={"enabled": "auto"},
        fp16={"enabled": False},
        zero_optimization={"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": False},
    )
    zero = options_for(3, None, path)["zero_optimization"]
    assert zero == {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}


def test_file_decides_what_deepspeed_reports(tmp_path: Path) -> None:
    path = config(tmp_path, steps_per_print=10, zero_optimization={"stage": 2, "offload_optimizer": None})
    assert options_for(2, None, path)["steps_per_print"] == 10
    assert options_for(2, None, None)["steps_per_print"] > 10**6


def test_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        options_for(1, None, tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        options_for(1, None, tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"backend": "zero3", "optimization": {"ema": 0.9}}, "write --backend zero2"),
        ({"backend": "zero1", "precision": "fp64"}, "does not serve fp64: write --backend ddp"),
        ({"backend": "zero1", "compile": True}, "does not serve compiled networks"),
        ({"verify_gradients": -1}, "write 0 or more"),
        ({"timeout_minutes": 0.0}, "cannot wait 0 minutes"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, object], said: str) -> None:
    changes = dict(settings)
    if isinstance(changes.get("optimization"), dict):
        changes["optimization"] = dataclasses.replace(PLAIN.optimization, **changes["optimization"])
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PLAIN, **changes)
