"""Steps, stages and epochs: where a run stands, and what is due there. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from pliant.engine.optimization import learning_rate
from pliant.errors import UserError
from pliant.experiment import Optimization
from pliant.recipe import Progress, Stage


@dataclass(frozen=True)
class Schedule:
    """The steps of a run."""

    stages: tuple[Stage, ...]
    steps: tuple[int, ...]
    """Steps of each stage."""
    steps_per_epoch: tuple[int, ...]
    """Of each stage."""
    optimization: Optimization

    @property
    def total(self) -> int:
        """Steps of the run."""
        return sum(self.steps)

    def before(self, stage: int) -> int:
        """Steps of the stages before this one."""
        return sum(self.steps[:stage])

    def locate(self, step: int) -> tuple[int, int]:
        """Stage, and steps done in it, after `step` steps of the run; the end of a stage is the start of the next."""
        stage = 0
        while stage < len(self.steps) - 1 and step >= self.steps[stage]:
            step -= self.steps[stage]
            stage += 1
        return stage, step

    def progress(self, stage: int, step: int) -> Progress:
        """What an iteration is told, before it."""
        return Progress(
            stage=stage,
            step=step,
            steps=self.steps[stage],
            epoch=step // self.steps_per_epoch[stage],
            run_share=(self.before(stage) + step) / self.total,
        )

    def lr(self, stage: int, step: int) -> float:
        """The learning rate of a step."""
        config = self.optimization
        warmup = round(config.warmup_epochs * self.steps_per_epoch[stage])
        described = self.stages[stage]
        shape = described.schedule or config.schedule
        return config.lr * described.learning_rate * learning_rate(step, self.steps[stage], warmup, shape, config.floor)

    def due(self, step: int, epochs: float) -> bool:
        """Whether something done every so many epochs, and at the end, is due after `step` steps of the run."""
        if step >= self.total:
            return True
        if epochs <= 0:
            return False
        interval = Fraction(epochs).limit_denominator(10**6)  # a tenth is meant where 0.1 is written
        return int(self._epochs(step) / interval) != int(self._epochs(step - 1) / interval)

    def _epochs(self, step: int) -> Fraction:
        """Passes over the training images in so many steps of the run."""
        stage, rest = self.locate(step)
        before = sum(
            (Fraction(*pair) for pair in zip(self.steps[:stage], self.steps_per_epoch, strict=False)), Fraction(0)
        )
        return before + Fraction(rest, self.steps_per_epoch[stage])


def make_schedule(stages: Sequence[Stage], config: Optimization, steps_per_epoch: Sequence[int]) -> Schedule:
    """The steps of each stage by its share of the epochs, or of the steps where these are set.

    Args:
        steps_per_epoch: of each stage.

    Raises:
        UserError: a stage would have no step, or a warm-up fills one.
    """
    shares = [0.0, *accumulate(stage.share for stage in stages)]
    steps = []
    for (start, end), per_epoch in zip(pairwise(shares), steps_per_epoch, strict=True):
        total = config.steps if config.steps is not None else round(config.epochs * per_epoch)
        steps.append(round(end * total) - round(start * total))
    for stage, count, per_epoch in zip(stages, steps, steps_per_epoch, strict=True):
        if count < 1 and config.steps != 0:
            raise UserError(
                f"Stage {stage.name} has no step in a run of {sum(steps)}: write more --optimization.epochs."
            )
        if config.warmup_epochs * per_epoch >= count > 0:
            raise UserError(
                f"A warm-up of {config.warmup_epochs:g} epochs fills all {count} steps of stage {stage.name}: write a "
                "shorter --optimization.warmup-epochs."
            )
    return Schedule(tuple(stages), tuple(steps), tuple(steps_per_epoch), config)
