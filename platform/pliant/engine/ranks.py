"""The processes of a run: how many there are, which one this is, and what they tell each other.

Methods marked Collective are called by every rank or by none.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from pliant.errors import Interrupted, RanksLost, UserError, optional_import

T = TypeVar("T")

_STRANGERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
_LOST = re.compile("timed? ?out|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)
"""How gloo and NCCL put it that another rank does not answer."""
_TO_START = timedelta(minutes=30)  # ranks may index a cold dataset at unlike speeds


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """This rank's part of 0 … number - 1, contiguous; parts differ by one at most."""
        return range(self.rank * number // self.count, (self.rank + 1) * number // self.count)

    def micro_batches(self, number: int) -> range:
        """Indices of the micro-batches that this rank runs, of `number` in the global batch.

        Raises:
            UserError: there are more ranks than micro-batches.
        """
        if self.count > number:
            raise UserError(
                f"A global batch of {number} micro-batches cannot be shared by {self.count} ranks: launch fewer ranks, "
                "or in a new run write a smaller --batch.micro."
            )
        return self.share(number)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Collective. The sum over ranks, in place."""
        if self.count > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def start_max(self, tensor: Tensor) -> dist.Work | None:
        """Collective. Starts the maximum over ranks, in place; wait for what it returns before reading."""
        return dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True) if self.count > 1 else None

    def any(self, flag: bool) -> bool:
        """Collective. Whether the flag is set on any rank."""
        if self.count == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor.item())

    def from_first(self, value: T) -> T:
        """Collective. Rank 0's value, on every rank."""
        if self.count == 1:
            return value
        box: list[T] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def rows(self, row: Tensor) -> Tensor:
        """Collective. Every rank's row (n,), stacked: (count, n)."""
        if self.count == 1:
            return row[None].clone()
        if not row.numel():  # of a network without running statistics; it may lie where NCCL does not reach
            return row.new_empty(self.count, 0)
        table = [torch.empty_like(row) for _ in range(self.count)]
        dist.all_gather(table, row)
        return torch.stack(table)

    def all(self, value: T) -> list[T]:
        """Collective. Every rank's value, in their order."""
        if self.count == 1:
            return [value]
        box: list[T] = [value] * self.count
        dist.all_gather_object(box, value)
        return box

    def from_rank(self, rank: int, tensor: Tensor) -> Tensor:
        """Collective. That rank's tensor, written into everyone's, of the same shape."""
        if self.count > 1:
            dist.broadcast(tensor, src=rank)
        return tensor

    def wait_at_most(self, minutes: float) -> None:
        """From now on a rank that waits longer for another gives up."""
        if self.count > 1:
            for group in list(distributed_c10d._world.pg_map):  # DeepSpeed has groups of its own
                distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), group)

    def barrier(self) -> None:
        """Collective. Waits for all ranks."""
        if self.count > 1:
            dist.barrier()


def join(requested: int | None = None, environment: dict[str, str] | None = None) -> Ranks:
    """Collective. Takes this process's place among those that were launched.

    Args:
        requested: refuse any other number of ranks.
        environment: of the launcher; default: this process's.

    Raises:
        UserError: another number was launched than asked for, or several processes of one launch would each take
            themselves for the whole run.
    """
    env = dict(os.environ) if environment is None else environment
    if "WORLD_SIZE" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env |= _adopt_srun(env)
    declared = int(env.get("WORLD_SIZE", "1"))
    if "WORLD_SIZE" not in env:
        _refuse_strangers(env)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ranks = Ranks(0, 1, device)
    if declared > 1:
        ranks = _join_group(device)
        if ranks.count != declared:
            raise UserError(
                f"{declared} processes were launched, but this one sees {ranks.count}: each would train alone and "
                "write the same files. Start them with torchrun --nproc_per_node N or accelerate launch --multi_gpu."
            )
    if requested is not None and ranks.count != requested:
        raise UserError(
            f"--ranks {requested} was asked for and {ranks.count} take part: launch {requested}, for instance with "
            f"torchrun --nproc_per_node {requested}, or leave --ranks out."
        )
    if device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    return ranks


def _refuse_strangers(env: dict[str, str]) -> None:
    for name, launcher in _STRANGERS.items():
        if int(env.get(name, "1")) > 1:
            raise UserError(
                f"{launcher} started {env[name]} processes ({name}), but without WORLD_SIZE and RANK each would take "
                "itself for the whole run: let it start one process per machine that calls torchrun or accelerate "
                "launch."
            )


def _adopt_srun(env: dict[str, str]) -> dict[str, str]:
    """What torchrun would have set, from what srun set: one rank per task."""
    slurm = optional_import("submitit.slurm.slurm", extra="slurm", purpose="A start by srun alone")
    tasks = slurm.SlurmJobEnvironment()
    # Every task comes to the same port by itself, and another step of the job, or the job put back in the queue, to
    # another one.
    launch = (tasks.job_id, env.get("SLURM_STEP_ID", "0"), env.get("SLURM_RESTART_COUNT", "0"))
    port = random.Random(".".join(launch)).randint(20000, 32767)  # below those that Linux gives away
    found = {
        "RANK": str(tasks.global_rank),
        "WORLD_SIZE": str(tasks.num_tasks),
        "LOCAL_RANK": str(tasks.local_rank),
        "LOCAL_WORLD_SIZE": str(tasks.num_tasks // tasks.num_nodes),
        "MASTER_ADDR": tasks.hostnames[0],
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }
    os.environ.update(found)
    return found


def _join_group(device: torch.device) -> Ranks:
    from accelerate import PartialState  # slow to import, and needed by several ranks only

    # NCCL keeps a record of its last collectives, and writes it when one takes too long.
    for name, value in {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}.items():
        os.environ.setdefault(name, value)
    state = PartialState(cpu=device.type == "cpu", timeout=_TO_START)
    return Ranks(state.process_index, state.num_processes, state.device)


@contextmanager
def joined(requested: int | None = None) -> Iterator[Ranks]:
    """Collective. This process among the others for as long as the `with` lasts; entered once by a process.

    Raises:
        UserError: as `join`.
        RanksLost: in a collective, another rank did not answer.
    """
    ranks = join(requested)
    together = False
    try:
        yield ranks
        together = True
    except Interrupted:
        together = True
        raise
    except RuntimeError as error:
        if ranks.count == 1 or not _LOST.search(str(error)):
            raise
        raise RanksLost(
            f"Rank {ranks.rank} waited in vain for another, which was killed or hangs ({str(error).splitlines()[0]}). "
            "The newest checkpoint stands; where the ranks stood may be said in the run's folder hangs."
        ) from error
    finally:
        # NCCL closes a group together. One rank that fails alone would wait for the others, which wait for it.
        if together or ranks.device.type != "cuda":
            leave()


def abandoned() -> bool:
    """Whether a process group was left open, so that this process had better end at once."""
    return dist.is_initialized()


def leave() -> None:
    """Closes the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # Gloo's threads let go of the last tensors only now, and need the interpreter's lock for it: one that waits for
        # it while the interpreter shuts down aborts the process (torch 2.13).
        time.sleep(0.1)
