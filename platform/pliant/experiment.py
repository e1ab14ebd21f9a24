"""What a run is: frozen dataclasses that the command line fills and the run folder keeps.

Every recipe file holds one `Experiment`; another run is that value with a few fields replaced. Contradictions
are refused here, before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pliant.errors import UserError
from pliant.images import Data
from pliant.recipe import Recipe, ScheduleName

__all__ = ["Batching", "Calibration", "Data", "Experiment", "Optimization", "Saving"]  # what a recipe file fills

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
BackendName = Literal["auto", "single", "ddp", "zero0", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True)
class Batching:
    """The global batch is an ordered list of micro-batches; ranks share out the list."""

    images: int = 1024
    """Images of a step, over all ranks."""
    micro: int = 128
    """Images of a micro-batch: batch-norm statistics are taken over it. Fixed for the life of a run."""

    def __post_init__(self) -> None:
        if self.micro < 1 or self.images < 1 or self.images % self.micro:
            raise UserError(
                f"A global batch of {self.images} images is no whole number of micro-batches of {self.micro}: "
                f"write --batch.images as a multiple of --batch.micro."
            )
        if self.micro < 2:
            raise UserError("Batch norm has no variance over a single image: write --batch.micro 2 or more.")

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all ranks."""
        return self.images // self.micro

    def times(self, number: int) -> Batching:
        """So many times as many images a step, in micro-batches of the same size."""
        return dataclasses.replace(self, images=self.images * number)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The optimizer and its schedule."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    """Stochastic gradient descent with momentum, or Adam, whose decays are 0.9 and 0.999."""
    lr: float = 0.5
    """Learning rate at its peak, for the whole global batch."""
    floor: float = 0.0
    """Share of the peak that the schedule ends at, in [0, 1)."""
    momentum: float = 0.9
    """Of SGD."""
    nesterov: bool = True
    """Of SGD."""
    weight_decay: float = 1e-4
    """Share of a weight that is added to its gradient."""
    decay: Literal["kernels", "all"] = "kernels"
    """kernels: as the authors of US-Nets, only dense convolutions and linear weights decay, neither batch
    norm nor biases nor depthwise convolutions. all: every parameter decays."""
    schedule: ScheduleName = "linear"
    """Shape of the learning rate from its peak to the floor, followed per step, within each stage. constant: it stays.
    steps: a tenth from one half on, a hundredth from three quarters on."""
    warmup_epochs: float = 0.0
    """Linear warm-up from 0 at the start of each stage."""
    epochs: float = 250.0
    """Length of the run in passes over the training images, all stages together."""
    steps: int | None = None
    """Length of the run in steps, instead of epochs; 0 keeps the weights that a run begins with."""
    clip: float | None = None
    """Largest norm of the gradient; a larger one is scaled down to it. Default: no clipping."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, evaluated in their place; after t steps at most t / (t +
    10), or the weights that a run began with would fill the average of a short one. Default: none."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 0:
            raise UserError(f"A run of {self.steps} steps cannot be: write --optimization.steps 0 or more.")
        if not 0.0 <= self.floor < 1.0:
            raise UserError(f"A share of the peak lies in [0, 1), not {self.floor:g}: write --optimization.floor 0.")
        if not 0.0 < self.epochs < math.inf:
            raise UserError(f"A run of {self.epochs:g} epochs trains nothing: write a number above 0.")
        if not 0.0 < self.lr < math.inf:
            raise UserError(f"A learning rate lies above 0, not {self.lr:g}: write for instance --optimization.lr 0.1.")
        if not 0.0 <= self.momentum < 1.0:
            raise UserError(f"Momentum lies in [0, 1), not {self.momentum:g}: write --optimization.momentum 0.9.")
        if not 0.0 <= self.weight_decay < math.inf:
            raise UserError(
                f"Weights cannot decay by {self.weight_decay:g}: write --optimization.weight-decay 0 or more."
            )
        if not 0.0 <= self.warmup_epochs < math.inf:
            raise UserError(f"A warm-up cannot last {self.warmup_epochs:g} epochs: write 0 or more.")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise UserError(f"An EMA decay lies between 0 and 1, not {self.ema:g}: write for instance 0.9999.")
        if self.clip is not None and not 0.0 < self.clip < math.inf:
            raise UserError(f"Gradients cannot be clipped to a norm of {self.clip:g}: write a number above 0.")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Post-statistics of batch norm (US-Nets section 3.2)."""

    images: int = 2048
    """Training images, a fixed draw; 0 is all of them. The last batch may be shorter; a single image left for it is
    left out, as it has no variance."""
    average: Literal["pooled", "cumulative", "moving"] = "pooled"
    """pooled: exact mean and variance of all values a layer saw. cumulative: Eq. 8 as printed, means of the
    batches' means and variances. moving: Eq. 5 with m = 0.9, from the first batch's statistics."""
    augment: bool = True
    """Calibrate on augmented training images, as they were trained on (but never mixed) and as the authors' code does;
    else on centre crops, whose statistics differ (on CIFAR-10, padded and cropped in training, that costs 2.5
    points)."""
    batch: int = 64
    """Images of a calibration batch."""

    def __post_init__(self) -> None:
        if self.images < 0 or self.images == 1:
            raise UserError(
                f"Batch norm has no variance with --calibration.images {self.images}: write 2 or more, or 0 for all."
            )
        if self.batch < 2:
            raise UserError(
                f"Batch norm has no variance over {self.batch} images: write --calibration.batch 2 or more."
            )


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Checkpoints."""

    every_steps: int | None = None
    """Save after so many steps; default: after each epoch. At the end of a stage there is a checkpoint besides."""
    every_minutes: float | None = None
    """Save as well when so many minutes have gone by since the last save."""
    keep: int = 2
    """The newest checkpoints kept, besides the best and those at the ends of stages; at least 2, so that a damaged one
    can be stepped over."""

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise UserError("Keep at least two checkpoints (--saving.keep 2): if one is damaged, the other serves.")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise UserError("Checkpoints are some time apart: write for instance --saving.every-minutes 15.")
        if self.every_steps is not None and self.every_steps < 1:
            raise UserError("Checkpoints are at least one step apart: write --saving.every-steps 1 or more.")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run."""

    name: str
    """Folder of its runs below `runs`."""
    recipe: Recipe
    data: Data = field(default_factory=Data)
    batch: Batching = Batching()
    optimization: Optimization = Optimization()
    calibration: Calibration = Calibration()
    saving: Saving = Saving()
    precision: Precision = "fp32"
    """Type that the forward computes in: bf16 and fp16 by autocast over fp32 weights; fp64 with weights of its own, for
    comparing runs, as it does not show in which order a sum was taken."""
    compile: bool = False
    """Compile the network with torch.compile; only for recipes with a fixed set of widths, and plain networks."""
    backend: BackendName = "auto"
    """How gradients are reduced. auto: what accelerate launch was told; else ddp on several ranks, single on one.
    zero0 to zero3: DeepSpeed's ZeRO, which shares out optimizer state (1), gradients (2) and weights (3)."""
    deepspeed_config: Path | None = None
    """DeepSpeed's configuration file, for a ZeRO backend; default: the one that accelerate launch names, if any."""
    verify_gradients: int = 0
    """Compare the reduced gradient of so many first steps with that of one process, and stop if they differ."""
    timeout_minutes: float = 10.0
    """How long a rank waits for the others, once the first step is done, before the run is given up."""
    threads: int | None = None
    """Threads that each rank computes with on CPUs; default: the machine's cores, shared out among its ranks."""
    ranks: int | None = None
    """Refuse any other number of ranks; default: as many as were launched."""
    seed: int = 0
    """All draws of the run depend on it."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    resume: str | None = None
    """auto: go on from the newest whole checkpoint of the newest run of this name; or the folder of a run."""
    evaluate_epochs: float = 1.0
    """Epochs between validations while training; 0: only at the end."""
    log_steps: int = 10
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"A seed lies in [0, 2**63), not {self.seed}: write for instance --seed 0.")
        if self.threads is not None and self.threads < 1:
            raise UserError("A rank computes with at least one thread: write --threads 1 or more.")
        if self.log_steps < 1:
            raise UserError("Log lines are at least one step apart: write --log-steps 1 or more.")
        if self.evaluate_epochs and not 1e-3 <= self.evaluate_epochs < math.inf:
            raise UserError(
                f"Validations cannot be {self.evaluate_epochs:g} epochs apart: write --evaluate-epochs 0.001 or more, "
                "or 0 for one at the end."
            )
        if self.verify_gradients < 0:
            raise UserError(f"Gradients cannot be verified in {self.verify_gradients} steps: write 0 or more.")
        if not 0.0 < self.timeout_minutes < math.inf:
            raise UserError(f"Ranks cannot wait {self.timeout_minutes:g} minutes: write for instance 10.")
        if self.backend == "zero3" and self.optimization.ema is not None:
            raise UserError(
                "--optimization.ema keeps all weights on every rank, which ZeRO 3 is there to avoid: write --backend "
                "zero2, or leave --optimization.ema out."
            )
        if self.backend.startswith("zero") and (self.compile or self.precision == "fp64"):
            what = "compiled networks" if self.compile else "fp64"
            raise UserError(f"--backend {self.backend} does not serve {what}: write --backend ddp.")
        stages = self.recipe.stages()
        if abs(sum(stage.share for stage in stages) - 1.0) > 1e-6:
            shares = ", ".join(f"{stage.name} {stage.share:g}" for stage in stages)
            raise UserError(f"The shares of a recipe's stages must add up to 1: got {shares}.")
        for stage in stages:
            if not 0.0 < stage.learning_rate < math.inf:
                raise UserError(
                    f"Stage {stage.name} cannot learn at {stage.learning_rate:g} times the learning rate: write a "
                    "factor above 0."
                )
            if stage.batch < 1:
                raise UserError(
                    f"Stage {stage.name} cannot take {stage.batch} times --batch.images a step: write a whole number "
                    "from 1."
                )
        refusal = self.recipe.admits_mixing() if self.data.mixes else None
        if refusal is not None:
            raise UserError(f"{refusal}: write --data.mixup 0 --data.cutmix 0.")

    def batching(self, stage: int) -> Batching:
        """The steps of a stage, by its index."""
        return self.batch.times(self.recipe.stages()[stage].batch)
