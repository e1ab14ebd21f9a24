"""How fast the steps go, and what their passes came to, between two lines of the log."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from pliant.data import Batch
from pliant.engine.optimization import Update
from pliant.engine.ranks import Ranks
from pliant.engine.schedule import Schedule
from pliant.engine.step import Losses
from pliant.engine.telemetry import Window
from pliant.experiment import Batching
from pliant.recipe import Progress


class _Moment:
    """A point in time, of the device where it works on its own."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        self._clock = time.perf_counter()

    def until(self, later: _Moment) -> float:
        """Seconds; once the device has come so far."""
        if self._event is not None and later._event is not None:
            return float(self._event.elapsed_time(later._event)) / 1000
        return later._clock - self._clock


class Meter:
    """Collects the steps of a window; losses stay on the device until the window is read."""

    def __init__(self, schedule: Schedule, ranks: Ranks, batching: Batching) -> None:
        self._schedule, self._ranks, self._batching = schedule, ranks, batching
        self._clear()

    def _clear(self) -> None:
        self._losses: list[Losses] = []
        self._seconds = self._waited = 0.0
        self._since = time.perf_counter()
        self._alone: list[tuple[_Moment, _Moment]] = []

    def timed(self, batches: Iterator[Batch], number: int) -> Iterator[Batch]:
        """A step begins: its `number` micro-batches, with the time spent waiting for them counted."""
        self._begun = _Moment(self._ranks.device)
        return self._timed(batches, number)

    def reducing(self) -> None:
        """This rank has done what it can do alone in this step."""
        self._alone.append((self._begun, _Moment(self._ranks.device)))

    def _timed(self, batches: Iterator[Batch], number: int) -> Iterator[Batch]:
        for _ in range(number):
            started = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - started
            yield batch

    def add(self, losses: Losses) -> None:
        """A step is done."""
        self._losses.append(losses)

    def pause(self) -> None:
        """The clock stands until `resume`: validation and saving do not count as training."""
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        """The clock goes on."""
        self._since = time.perf_counter()

    def window(self, done: int, skipped: int, progress: Progress, lr: float, last: Update) -> Window:
        """Collective. What the steps since the last call came to.

        Args:
            done: steps done, over all stages.
            skipped: of these, steps left out.
            progress: of the last step.
            lr: of the last step.
            last: what it did.
        """
        losses = self._means([(one.names, one.values) for one in self._losses])
        metrics = self._means([(one.metric_names, one.metric_values) for one in self._losses])
        norm = last.norm.item()  # waits for the device, so that the clock shows what the steps really took
        seconds = self._seconds + time.perf_counter() - self._since
        steps = len(self._losses)
        micro_batches = steps * self._batching.micro_batches
        passes = len(self._losses[-1].values) / len(self._ranks.share(self._batching.micro_batches))
        alone = sum(begun.until(ended) for begun, ended in self._alone) / max(1, len(self._alone))
        device = self._ranks.device
        memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
        rows = self._ranks.rows(torch.tensor([alone, memory], dtype=torch.float64, device=device))
        window = Window(
            step=done,
            steps=self._schedule.total,
            stage=self._schedule.stages[progress.stage].name,
            epoch=(progress.step + 1) / self._schedule.steps_per_epoch[progress.stage],
            lr=lr,
            losses=losses,
            metrics=metrics,
            norm=norm,
            skipped=skipped,
            seconds=seconds,
            images_per_s=micro_batches * self._batching.micro / seconds,
            passes_per_s=micro_batches * passes / seconds,
            data_share=min(1.0, self._waited / seconds),
            rank_seconds=tuple(rows[:, 0].tolist()),
            memory_gib=rows[:, 1].max().item() if device.type == "cuda" else None,
            seconds_left=seconds / steps * (self._schedule.total - done),
        )
        self._clear()
        return window

    def _means(self, steps: list[tuple[list[str], list[torch.Tensor]]]) -> dict[str, float]:
        """Collective. The mean of each name over steps, micro-batches and ranks; the names are the same on each."""
        names = list(dict.fromkeys(name for names, _ in steps for name in names))
        if not names:
            return {}
        index = torch.tensor([names.index(name) for step, _ in steps for name in step], device=self._ranks.device)
        values = torch.stack([value.double() for _, step in steps for value in step])
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=self._ranks.device)
        sums[0].index_add_(0, index, values)
        sums[1].index_add_(0, index, torch.ones_like(values))
        totals, counts = self._ranks.sum_(sums).tolist()
        return {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}
