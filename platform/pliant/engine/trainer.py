"""The loop: stages, steps, validation, checkpoints, and stopping in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pliant.data import Batch, Feed
from pliant.engine import checkpoint, sameness
from pliant.engine.agreement import Beat, Beats
from pliant.engine.backends import Backend, wrap
from pliant.engine.batchnorm import RunningStatistics, flat, mean_over_ranks, running_buffers, twin, unflatten_
from pliant.engine.diagnosis import Finding, watching
from pliant.engine.evaluation import evaluate, shared_out
from pliant.engine.folder import RunFolder
from pliant.engine.interruption import Interruption, Stopped
from pliant.engine.meter import Meter
from pliant.engine.optimization import Update, set_learning
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.rehearsal import rehearse
from pliant.engine.saving import Saver
from pliant.engine.schedule import Schedule
from pliant.engine.step import Losses, accumulate
from pliant.engine.telemetry import Telemetry
from pliant.engine.verification import verify
from pliant.engine.watchdog import Watchdog
from pliant.errors import Interrupted, UserError
from pliant.experiment import Experiment
from pliant.randomness import Draw
from pliant.recipe import Recipe

T = TypeVar("T")

_MOST_SKIPPED = 20  # steps in a row with a gradient that is not finite, before the run gives up
_REHEARSED = 3  # steps in which ranks are compared before ZeRO 3 takes their word for the rest


@dataclass
class State:
    """What a checkpoint keeps besides tensors."""

    step: int = 0
    """Optimizer steps done, over all stages."""
    evaluated: int = -1
    """Steps done at the last validation."""
    score: float | None = None
    """What the held-out split said then."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    seconds: float = 0.0
    """Time spent training, over all processes that the run has had."""


@dataclass
class Trainer:
    """The parts of a run, and its loop."""

    experiment: Experiment
    ranks: Ranks
    folder: RunFolder
    feed: Feed
    net: nn.Module
    schedule: Schedule
    precision: Precision
    telemetry: Telemetry
    interruption: Interruption
    saver: Saver
    watchdog: Watchdog
    ema: Any
    """timm's moving average of the network, or None."""
    state: State = field(default_factory=State)
    backend: Backend = field(init=False)
    """Of the stage that runs."""
    running: RunningStatistics = field(init=False)
    beats: Beats = field(init=False)
    """Of the stage that runs."""
    _verified: int = field(init=False, default=0)
    _finding: Finding = field(init=False, default_factory=Finding)

    @property
    def recipe(self) -> Recipe:
        """The method."""
        return self.experiment.recipe

    def run(self, restored: dict[str, Any] | None) -> None:
        """Collective. Trains from where `restored` stood to the end.

        Raises:
            Interrupted: a signal came; a checkpoint was written first.
            UserError: the recipe or the data cannot be used.
        """
        if restored is not None:
            self._restore(restored)
        first_stage, _ = self.schedule.locate(self.state.step)
        for stage in range(first_stage, len(self.schedule.stages)):
            self._stage(stage, restored if stage == first_stage else None)

    def _stage(self, stage: int, restored: dict[str, Any] | None) -> None:
        config = self.experiment
        set_learning(self.net, self.schedule.stages[stage])
        first = self.state.step - self.schedule.before(stage)
        if stage > 0 and first == 0:
            self._level_statistics(self.net)  # what is frozen from here on normalises with them, alike on all ranks
        if config.backend == "zero3":
            self._rehearse(stage, first)
        self.backend = wrap(
            self.net, self.ranks, config.backend, config.optimization, self.precision, config.deepspeed_config
        )
        if restored is not None and restored["stage"] == stage:
            self.backend.load_optimizer_state(restored["optimizer"])
        self.beats = Beats(self.ranks)
        if restored is not None and self._validation_due:  # it was stopped in that validation
            self._after_step(stage, Beat())
        steps, times = range(first, self.schedule.steps[stage]), self.schedule.stages[stage].batch
        with self.feed.training(
            stage=stage, first_step=steps.start, last_step=steps.stop, micro_batches=self._own(stage), times=times
        ) as batches:
            self._steps(stage, steps, batches)
        if self.schedule.total == 0:
            self._after_step(stage, Beat())
        self.net = self.backend.close()

    def _rehearse(self, stage: int, first: int) -> None:
        """Collective. Refuses a recipe whose ranks run unlike layers, or run them in another order."""
        steps = range(first, min(first + _REHEARSED, self.schedule.steps[stage]))
        times = self.schedule.stages[stage].batch
        with self.feed.training(
            stage=stage, first_step=steps.start, last_step=steps.stop, micro_batches=self._own(stage), times=times
        ) as batches:
            for step in steps:
                rehearse(
                    self.recipe,
                    self.net,
                    self.precision,
                    self.ranks,
                    [next(batches) for _ in self._own(stage)],
                    self._draws(stage, step),
                    self.schedule.progress(stage, step),
                )

    def _own(self, stage: int) -> Sequence[int]:
        """Indices in a stage's global batch of this rank's micro-batches."""
        return self.ranks.micro_batches(self._total(stage))

    def _total(self, stage: int) -> int:
        """Micro-batches of a stage's step, over all ranks."""
        return self.experiment.batch.micro_batches * self.schedule.stages[stage].batch

    def _draws(self, stage: int, step: int) -> list[Draw]:
        return [Draw(self.experiment.seed, stage, step, index) for index in self._own(stage)]

    def _steps(self, stage: int, steps: range, batches: Iterator[Batch]) -> None:
        config = self.experiment
        self.running = RunningStatistics(self.net)
        meter = Meter(self.schedule, self.ranks, config.batching(stage))
        for step in steps:
            lr = self.schedule.lr(stage, step)
            losses, done = self._step(stage, step, batches, meter, lr)
            self.state.step += 1
            asked, due = self.interruption.asked, self.saver.minutes_are_up
            beat = self._heed(self.beats.beat(done.nonfinite, stop=asked, save=due))
            meter.add(losses)
            if self.state.step % config.log_steps == 0 or self.state.step == self.schedule.total:
                window = meter.window(
                    self.state.step, self.state.skipped, self.schedule.progress(stage, step), lr, done
                )
                self.state.seconds += window.seconds
                self.telemetry.window(window)
            meter.pause()
            self._after_step(stage, beat)
            if step == steps.start:
                self.saver.prepare(self._checkpoint(stage))  # the optimizer has its state now
                self.ranks.wait_at_most(config.timeout_minutes)
            self.watchdog.alive()  # not before the first step is done, which may take long
            meter.resume()
        self._heed(self.beats.last())

    def _step(self, stage: int, step: int, batches: Iterator[Batch], meter: Meter, lr: float) -> tuple[Losses, Update]:
        config, progress, draws = self.experiment, self.schedule.progress(stage, step), self._draws(stage, step)
        total = self._total(stage)
        micro_batches: Any = meter.timed(batches, len(draws))
        verifying = self._verified < config.verify_gradients
        if verifying:
            micro_batches = list(micro_batches)
        # Where the run is about to be given up, the last steps say which layer is at fault.
        close = self.state.skipped_in_a_row >= _MOST_SKIPPED - 3
        with watching(self.net) if close else nullcontext(self._finding) as self._finding:
            losses = accumulate(
                self.recipe,
                self.net,
                self.backend,
                self.running,
                micro_batches,
                draws,
                progress,
                total,
                meter.reducing,
            )
        if verifying:
            self._verified += 1
            verify(
                self.recipe,
                self.backend,
                self.precision,
                self.ranks,
                micro_batches,
                config.seed,
                progress,
                total,
            )
        done = self.backend.update(lr)
        self.running.settle(done.nonfinite)
        if self.ema is not None:
            self.ema.update(self.net, self.state.step + 1)
        return losses, done

    def _heed(self, beat: Beat) -> Beat:
        """Counts skipped steps, and gives up after too many in a row."""
        if beat.nonfinite is None:
            return beat
        self.state.skipped += beat.nonfinite
        self.state.skipped_in_a_row = self.state.skipped_in_a_row + 1 if beat.nonfinite else 0
        if self.state.skipped_in_a_row >= _MOST_SKIPPED:
            raise UserError(
                f"The gradient was not finite in {_MOST_SKIPPED} steps in a row, up to step {self.state.step}; "
                f"{self._finding}. Write a smaller --optimization.lr, a --optimization.clip, or --precision fp32."
            )
        return beat

    @property
    def _validation_due(self) -> bool:
        due = self.schedule.due(self.state.step, self.experiment.evaluate_epochs)
        return due and self.state.step > 0 and self.state.evaluated != self.state.step

    def _after_step(self, stage: int, beat: Beat) -> None:
        """Validates and saves where that is due; leaves if asked to."""
        stopping = beat.stop
        if self._validation_due and not stopping:
            try:
                self._validate()
            except Stopped:
                stopping = True
        step, every = self.state.step, self.experiment.saving.every_steps
        due = step % every == 0 if every else self.schedule.due(step, 1.0)
        due = due or beat.save or (self.state.evaluated == step and self.state.score is not None)  # it may be the best
        last = step == self.schedule.total
        ended = step > 0 and not last and self.schedule.locate(step)[1] == 0  # a stage; also where it is gone on from
        if due or ended or last or stopping:
            late = self._heed(self.beats.last())  # of this step: a checkpoint counts it
            stopping = stopping or (late.stop and not last)
            score = self.state.score if self.state.evaluated == step else None
            self.saver.save(step, self._checkpoint(stage), score=score, must=last or stopping, lasting=ended)
        if stopping:
            raise Interrupted(
                f"Stopped after step {step} of {self.schedule.total}, with a checkpoint in {self.folder.path}.",
                run=self.folder.path,
            )

    def _validate(self) -> None:
        """Collective. Follows the tracked points on the held-out split, or on the validation images.

        Raises:
            Stopped: asked to stop in the middle; nothing is recorded.
        """
        dataset = self.feed.dataset
        split: Literal["held_out", "val"] = "val" if dataset.held_out is None else "held_out"
        points = self.recipe.tracked()
        if points and getattr(dataset, split) is not None:
            net, batch = self.evaluated_net(), self.experiment.batch.micro
            with shared_out(self.feed, split, batch, self.ranks, self.interruption) as batches:
                lines = evaluate(
                    self.recipe,
                    dict.fromkeys(points, net),
                    self._watched(batches),
                    precision=self.precision,
                    ranks=self.ranks,
                )
            # Choosing by the validation images would make them a training set: only held-out images give a score.
            self.state.score = self.recipe.score(lines) if split == "held_out" else None
            self.telemetry.measurements(split, self.state.step, lines)
        self.state.evaluated = self.state.step

    def _watched(self, batches: Iterator[T]) -> Iterator[T]:
        for batch in batches:
            self.watchdog.alive()
            yield batch

    def evaluated_net(self) -> nn.Module:
        """Collective. A twin, of the averaged weights if there is an EMA, with the mean of the ranks' statistics."""
        one = twin(self.backend.whole() if self.ema is None else self.ema.module)
        self._level_statistics(one)
        return one

    def _level_statistics(self, net: nn.Module) -> None:
        """Collective. Gives every rank's running statistics their mean over ranks."""
        if self.ranks.count > 1:
            unflatten_(running_buffers(net), self._mean(self.ranks.rows(flat(running_buffers(net)))))

    def _mean(self, rows: Tensor) -> Tensor:
        stage, _ = self.schedule.locate(max(0, self.state.step - 1))  # of the last step that was done
        return mean_over_ranks(rows, self._total(stage))

    def _checkpoint(self, stage: int) -> dict[str, Any]:
        """Collective. All that the run needs to go on from here."""
        return {
            "net": self.backend.whole().state_dict(),
            "rows": self.ranks.rows(flat(running_buffers(self.net))),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_rows": None if self.ema is None else self.ranks.rows(flat(running_buffers(self.ema.module))),
            "optimizer": self.backend.optimizer_state(),
            "precision": self.precision.state(),
            "stage": stage,
            "state": dict(self.state.__dict__),
            "ranks": self.ranks.count,
            "threads": torch.get_num_threads(),
            "loader": self.feed.loader,
            "images": sameness.kept(self.feed.dataset.train.fingerprint),
        }

    def _restore(self, restored: dict[str, Any]) -> None:
        self.state = State(**restored["state"])
        checkpoint.load_weights(self.net, restored["net"], self.folder.path)
        self._restore_rows(self.net, restored["rows"])
        if self.ema is not None:
            checkpoint.load_weights(self.ema.module, restored["ema"], self.folder.path)
            self._restore_rows(self.ema.module, restored["ema_rows"])
        self.precision.load(restored["precision"])
        if restored["ranks"] == self.ranks.count and restored["threads"] != torch.get_num_threads():
            self.telemetry.warn(
                f"this run had {restored['threads']} threads per rank and has {torch.get_num_threads()} now: it goes "
                "on right, but not bit for bit."
            )
        if restored["loader"] != self.feed.loader:
            self.telemetry.warn(f"images were decoded by {restored['loader']} and are by {self.feed.loader} now.")

    def _restore_rows(self, net: nn.Module, rows: Tensor) -> None:
        """The same number of ranks goes on with its own running statistics, another with their mean."""
        own = rows[self.ranks.rank] if len(rows) == self.ranks.count else self._mean(rows)
        unflatten_(running_buffers(net), own.to(self.ranks.device))
