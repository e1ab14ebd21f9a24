"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, TensorBoard, and log.jsonl.

Only the first rank speaks. A log that cannot be written (a full disk) is said once and never ends a run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from pliant.engine.folder import RunFolder
from pliant.errors import printable
from pliant.recipe import Measurement

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_SLOW = 1.2  # a rank that takes this much longer than the median is named


@dataclass(frozen=True, kw_only=True)
class Window:
    """What the steps between two lines of the log came to."""

    step: int
    """Steps done, over all stages."""
    steps: int
    """Steps of the run in all."""
    stage: str
    epoch: float
    """Epochs done in the stage."""
    lr: float
    losses: Mapping[str, float]
    """Mean loss of each pass, over the window and all ranks."""
    metrics: Mapping[str, float]
    norm: float
    """Norm of the last step's gradient, before clipping."""
    skipped: int
    """Steps left out so far, their gradient not being finite."""
    seconds: float
    """What the window's steps took."""
    images_per_s: float
    """Over all ranks."""
    passes_per_s: float
    """Forward and backward passes of micro-batches, over all ranks."""
    data_share: float
    """Share of this rank's time spent waiting for data, in [0, 1]."""
    rank_seconds: tuple[float, ...]
    """What each rank spent on a step before it had to wait for the others: loading, and all passes up to the last
    backward."""
    memory_gib: float | None
    """Peak of the memory that tensors have taken since the start, on the GPU where it is highest; None without GPUs."""
    seconds_left: float

    @property
    def slowest(self) -> tuple[int, float]:
        """The rank that the others wait for, and its seconds over their median."""
        slowest = max(self.rank_seconds)
        middle = statistics.median(self.rank_seconds)
        return self.rank_seconds.index(slowest), slowest / middle if middle > 0 else 1.0

    def speed(self) -> str:
        """Images and passes a second, the share of time that data was waited for, and steps that came to nothing."""
        skipped = f"  skipped {self.skipped}" if self.skipped else ""
        return (
            f"{self.images_per_s:.0f} images/s  {self.passes_per_s:.1f} passes/s  data {self.data_share:.0%}{skipped}"
        )

    def each_loss(self) -> str:
        """The loss of each pass."""
        return "  ".join(f"{name} {value:.3f}" for name, value in self.losses.items())

    def line(self) -> str:
        """One line for a person."""
        rank, times = self.slowest
        waits = f"  slowest rank {rank} ({times:.2f}x)" if len(self.rank_seconds) > 1 and times > _SLOW else ""
        memory = "" if self.memory_gib is None else f"  memory {self.memory_gib:.1f} GiB"
        return (
            f"step {self.step}/{self.steps}  epoch {self.epoch:.2f}  loss {self.each_loss()}  lr {self.lr:.4g}  "
            f"{self.speed()}{memory}{waits}  left {duration(self.seconds_left)}"
        )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, for instance 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Bar(Progress):
    """The losses in a line of their own: beside the bar they would not fit into 80 columns."""

    losses = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield Text(self.losses, no_wrap=True, overflow="ellipsis")
        yield from super().get_renderables()


class Telemetry:
    """Where a run's words and figures go; to be entered with `with`. Silent on all ranks but the first."""

    def __init__(self, folder: RunFolder, *, first: bool, step: int) -> None:
        """`step`: steps done before; TensorBoard drops what an earlier, killed process wrote beyond it."""
        self._folder = folder
        self._speaks = first
        self._console = Console(stderr=False, highlight=False, soft_wrap=True)
        self._bar: _Bar | None = None
        self._task = TaskID(0)
        self._last: Window | None = None
        self._step = step
        self._boards: SummaryWriter | None = None
        self._complained = False

    def __enter__(self) -> Telemetry:
        if self._speaks and self._console.is_terminal:
            self._bar = _Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("{task.fields[left]}", style="progress.remaining"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("first steps", total=None, figures="", left="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            if self._last is not None:
                self.say(self._last.line())  # the bar takes its words with it
        if self._boards is not None:
            self._guard(self._boards.close)

    def say(self, text: str) -> None:
        """A line for a person."""
        if self._speaks:
            self._console.print(Text(printable(text)), soft_wrap=True)
            if not self._console.is_terminal:
                sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line for a person who may want to act; kept in log.jsonl."""
        self.say(f"Warning: {text}")
        self._log({"event": "warning", "text": printable(text)})

    def event(self, name: str, **values: Any) -> None:
        """A line of log.jsonl alone."""
        self._log({"event": name, **values})

    def window(self, window: Window) -> None:
        """The steps between two lines of the log."""
        if not self._speaks:
            return
        if self._bar is None:
            self.say(window.line())
        else:
            self._bar.losses = window.each_loss()
            self._bar.update(
                self._task,
                total=window.steps,
                completed=window.step,
                description=f"epoch {window.epoch:.1f}",
                figures=window.speed(),
                left=f"left {duration(window.seconds_left)}",
            )
            self._last = window
        self._log({"event": "step", **window.__dict__})
        scalars = {f"loss/{name}": value for name, value in window.losses.items()}
        scalars |= {f"metrics/{name}": value for name, value in window.metrics.items()}
        for name in ("lr", "norm", "skipped", "images_per_s", "passes_per_s", "data_share"):
            scalars[f"run/{name}"] = getattr(window, name)
        if window.memory_gib is not None:
            scalars["run/memory_gib"] = window.memory_gib
        if len(window.rank_seconds) > 1:
            scalars["ranks/slowest_over_median"] = window.slowest[1]
            scalars |= {f"ranks/seconds/{rank}": seconds for rank, seconds in enumerate(window.rank_seconds)}
        self._scalars(scalars, window.step)

    def measurements(self, title: str, step: int, lines: Sequence[Measurement]) -> None:
        """An evaluation."""
        if not self._speaks:
            return
        text = "  ".join(f"{line.point} {line.top1:.2%}" for line in lines)
        images = lines[0].images if lines else 0
        self.say(f"{title} at step {step}, top-1 on {images} images: {text}")
        self._log({"event": title, "step": step, "lines": [line.__dict__ for line in lines]})
        scalars: dict[str, float] = {}
        for line in lines:
            scalars |= {f"{title}/top1/{line.point}": line.top1, f"{title}/loss/{line.point}": line.loss}
        self._scalars(scalars, step)

    def _log(self, entry: Mapping[str, Any]) -> None:
        if self._speaks:
            self._guard(lambda: _append(self._folder, entry))

    def _scalars(self, scalars: Mapping[str, float], step: int) -> None:
        self._guard(lambda: self._write_scalars(scalars, step))

    def _write_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        if self._boards is None:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            self._boards = SummaryWriter(str(self._folder.tensorboard), purge_step=self._step + 1)
        for name, value in scalars.items():
            self._boards.add_scalar(name, value, step)

    def _guard(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            if not self._complained:
                self._complained = True
                self.say(
                    f"Warning: the log in {self._folder.path} cannot be written ({error.strerror}); the run goes on."
                )


def _append(folder: RunFolder, entry: Mapping[str, Any]) -> None:
    """A line of the log. What a kill or a full disk left of a line before it is cut off."""
    with folder.log.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(folder.log.read_bytes().rfind(b"\n") + 1)
        file.write(json.dumps(entry).encode() + b"\n")
