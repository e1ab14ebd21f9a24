"""DeepSpeed's ZeRO over several passes, called directly.

Tried over gloo, stage by stage (tests/test_truth_table.py). Stage 0 reduces in the anchored last backward, as DDP.
Stages 1 and 2 reduce once, when `coalesce_grad_reduction` ends, and need the anchor too: their buckets fill in the
order in which gradients come, which may differ per rank. Stage 3 gathers each layer's parameters from all ranks as the
layer runs, so every rank has to run the same layers in the same order: engine/rehearsal.py measures that beforehand.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.engine.backends.ddp import NextPass
from pliant.engine.backends.deepspeed_file import options_for
from pliant.engine.optimization import Update, make_optimizer, placed, update, with_momentum
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.errors import UserError, optional_import
from pliant.experiment import Optimization
from pliant.recipe import Pass


class Zero:
    """Collective in its making. Gradients, optimizer state and, from stage 3 on, parameters are shared out."""

    def __init__(
        self,
        net: nn.Module,
        ranks: Ranks,
        stage: int,
        optimization: Optimization,
        precision: Precision,
        config: Path | None = None,
    ) -> None:
        if precision.name == "fp64":
            raise UserError("DeepSpeed has no fp64: write --precision fp32, or --backend ddp.")
        self.net, self.stage, self.precision = net, stage, precision
        self.averaged, self.anchored = ranks.count, stage < 3
        self._clip = optimization.clip
        with torch.no_grad():
            for parameter in net.parameters():  # DeepSpeed flattens them, and knows one memory layout only
                plain = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                parameter.data = plain.copy_(parameter)
        self._plain = copy.deepcopy(net)
        self.optimizer = make_optimizer(net, optimization)
        if stage == 0:  # the others keep it by their own shares
            with_momentum(self.optimizer)
        options = options_for(stage, optimization.clip, config)
        with _quiet():
            deepspeed = _deepspeed(ranks)
            self._module = NextLoss(net, precision)
            self._engine, *_ = deepspeed.initialize(model=self._module, optimizer=self.optimizer, config=options)
        self._deepspeed = deepspeed

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """From stage 1 on, the gradient is reduced as it ends."""
        if self.stage == 0:
            yield
            return
        if self.precision.name == "fp16":
            self._engine.optimizer.override_loss_scale(self.precision.scale)
        with self._engine.coalesce_grad_reduction():
            yield

    def forward(self, passes: Iterator[Pass], *, reduces: bool) -> Pass | None:
        """The next pass, or None."""
        self._reduces = reduces
        with self._held():
            self._engine(passes)
        return self._module.take()

    def backward(self, loss: Tensor) -> None:
        """Accumulates its gradient."""
        with self._held():
            self._engine.backward(self.precision.scaled(loss) if self.stage == 0 else loss)

    def _held(self) -> AbstractContextManager[Any]:
        """Stage 0 reduces in every backward unless it is told not to."""
        if self.stage == 0 and not self._reduces:
            held: AbstractContextManager[Any] = self._engine.no_sync()
            return held
        return contextlib.nullcontext()

    def gradients(self) -> dict[str, Tensor]:
        """Collective. Put together from the ranks' shares."""
        safe_get_full_grad = self._deepspeed.utils.safe_get_full_grad

        scale = self.precision.scale
        found = {name: safe_get_full_grad(parameter) for name, parameter in self._learning().items()}
        return {name: gradient / scale for name, gradient in found.items() if gradient is not None}

    def update(self, lr: float) -> Update:
        """Collective. From stage 1 on each rank updates its share, and DeepSpeed clips and leaves out by the norm."""
        if self.stage == 0:
            return update(self.optimizer, self.precision, lr=lr, clip=self._clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        device = next(self._plain.parameters()).device
        nonfinite = torch.tensor(float(self._engine.optimizer.overflow), device=device)
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=device)
        self.precision.observe(nonfinite)
        return Update(norm, nonfinite)

    def whole(self) -> nn.Module:
        """Collective. Stage 3's parameters are put together in a copy; those of the others are whole."""
        return self._copied() if self.stage == 3 else self.net

    def _copied(self) -> nn.Module:
        """Collective."""
        with self._gathered(), torch.no_grad():
            for parameter, whole in zip(self._plain.parameters(), self.net.parameters(), strict=True):
                parameter.copy_(whole)
            for buffer, own in zip(self._plain.buffers(), self.net.buffers(), strict=True):
                buffer.copy_(own)
        return self._plain

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Collective. Put together by parameter, so that any number of ranks, or another backend, can go on."""
        safe_get_full_optimizer_state = self._deepspeed.utils.safe_get_full_optimizer_state

        if self.stage == 0:
            return {name: dict(self.optimizer.state.get(one, {})) for name, one in self._learning().items()}
        keys, single = self._state_keys()
        self._link_states()
        return {
            name: {key: safe_get_full_optimizer_state(one, key) for key in keys} | single
            for name, one in self._learning().items()
        }

    def _state_keys(self) -> tuple[list[str], dict[str, Any]]:
        """Names of the values held by element, and the values held once."""
        for shard in self._shards():
            state = self.optimizer.state.get(shard, {})
            by_element = _by_element(state, shard.shape)
            return by_element, {key: value for key, value in state.items() if key not in by_element}
        return [], {}

    def _link_states(self) -> None:
        """So that parameters find their part. DeepSpeed links once, at the first step of the first group of parameters,
        when the states of the others are not made yet."""
        if self.stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _shards(self) -> list[Tensor]:
        zero = self._engine.optimizer
        shards: list[Tensor] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return shards

    def load_optimizer_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Each rank keeps its share."""
        safe_set_full_optimizer_state = self._deepspeed.utils.safe_set_full_optimizer_state

        learning = self._learning()
        if self.stage == 0:
            for name, one in learning.items():
                self.optimizer.state[one].update(
                    {key: placed(value, one) for key, value in state.get(name, {}).items()}
                )
            return
        name, first = next(iter(state.items()), ("", {}))
        if not first:  # no step was taken yet
            return
        by_element = _by_element(first, getattr(learning[name], "ds_shape", learning[name].shape))
        for shard in self._shards():
            own = {key: torch.zeros_like(shard) for key in by_element}
            # A copy for each: a step counts in place.
            once = {key: placed(value, shard) for key, value in first.items() if key not in by_element}
            self.optimizer.state[shard].update(own | once)
        self._link_states()
        for name, one in learning.items():
            for key in by_element:
                safe_set_full_optimizer_state(one, state[name][key].to(one.device), key)

    def close(self) -> nn.Module:
        """Collective. A copy, free of DeepSpeed's hooks and flattened memory."""
        plain = self._copied()
        self._engine.destroy()
        return plain

    def _gathered(self) -> AbstractContextManager[Any]:
        if self.stage < 3:
            return contextlib.nullcontext()
        gathered: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(list(self.net.parameters()))
        return gathered

    def _learning(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.net.named_parameters() if parameter.requires_grad}


def _by_element(state: dict[str, Any], shape: torch.Size) -> list[str]:
    return [key for key, value in state.items() if isinstance(value, Tensor) and value.shape == shape]


class NextLoss(NextPass):
    """Gives DeepSpeed's hooks a tensor to hold on to, and keeps the pass itself aside.

    Autocast begins in here: DeepSpeed switches one off that it finds on a GPU when it is called.
    """

    def __init__(self, net: nn.Module, precision: Precision) -> None:
        super().__init__(net)
        self._precision = precision
        self._found: Pass | None = None

    def forward(self, passes: Iterator[Pass]) -> Tensor | None:  # type: ignore[override]
        with self._precision.autocast():
            self._found = super().forward(passes)
        return None if self._found is None else self._found.loss

    def take(self) -> Pass | None:
        """The pass that the last forward found; it is not kept."""
        found, self._found = self._found, None
        return found


def _deepspeed(ranks: Ranks) -> Any:
    """Collective. The module, joined to the process group that there is."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Which launchers set, and DeepSpeed takes for the GPU's number; alone there is none, and where srun shows each task
    # its own GPU only, every task's has the number 0.
    if ranks.device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(ranks.device.index or 0)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed: Any = optional_import("deepspeed", extra="deepspeed", purpose="A ZeRO backend")
    ops = optional_import("deepspeed.ops", extra="deepspeed", purpose="A ZeRO backend")
    # Only inference uses this op, but starting would compile it: a minute, and a compiler.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if ranks.count == 1 and not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        kind = "nccl" if ranks.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(kind, store=store, rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(
            dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
        )
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed logs dozens of lines as it starts; errors still come through."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
