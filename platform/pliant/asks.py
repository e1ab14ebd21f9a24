"""What may be asked of runs on the command line: one value per command, and the points of a spectrum as text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pliant.errors import UserError
from pliant.experiment import Calibration
from pliant.recipe import Point, Width, parse_point

_CALIBRATION = ("images", "average", "augment")
Run = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    run: Run
    """Folder of the run, as train named it."""
    checkpoint: str = "newest"
    """newest, best (by the held-out split), or the step of one that was kept."""
    root: Path | None = None
    """Where the dataset lies now, if it has moved."""
    size: int | None = None
    """Height and width of the images, in pixels (image folders and shards); default: as trained."""
    images: int | None = None
    """Training images to calibrate batch norm on, 0 for all; default: as the run's experiment says."""
    average: Literal["pooled", "cumulative", "moving"] | None = None
    """How their statistics are averaged; default: as the run's experiment says."""
    augment: bool | None = None
    """Whether they are augmented as in training; default: as the run's experiment says."""

    def calibration(self, default: Calibration, *, needed: bool) -> Calibration:
        """The run's calibration with what was asked for in its place.

        Raises:
            UserError: something was asked for, and no point is calibrated.
        """
        asked = {name: value for name in _CALIBRATION if (value := getattr(self, name)) is not None}
        if asked and not needed:
            raise UserError(
                "Nothing is calibrated here, as the network has running statistics of its own: leave "
                f"--{next(iter(asked))} out."
            )
        return dataclasses.replace(default, **asked)

    def options(self) -> tuple[str, ...]:
        """Those that say which network and which images, as they were given."""
        named = ("checkpoint", "root", "size", *_CALIBRATION)
        given = {name: getattr(self, name) for name in named if getattr(self, name) not in (None, "newest")}
        return tuple(text for name, value in given.items() for text in (f"--{name}", str(value)))


@dataclass(frozen=True, kw_only=True)
class Ask(_OfRun):
    """Which network of a run, at which points, on which images."""

    at: tuple[str, ...] = ()
    """Points: widths (0.35 0.5), a range with its step (0.35:0.05:1.0), one width for each group (1/0.5/…), scales
    (S0.6), or native. Default: the recipe's own."""


@dataclass(frozen=True, kw_only=True)
class AskSpectrum(Ask):
    """Accuracy and cost of a run's network at many points, each image decoded once for all of them."""

    split: Literal["auto", "val", "held_out"] = "auto"
    """Which images; auto: the validation images, or the held-out ones where there are none."""
    execution: Literal["masked", "grouped"] | None = None
    """How a network on depth leaves blocks out (methods on depth); default: as the run's recipe says."""


@dataclass(frozen=True, kw_only=True)
class AskSlim(_OfRun):
    """Widths for each group of layers of a trained US-Net, at a cost: step by step that group gets narrower which loses
    least for what it saves."""

    macs: float
    """Multiply-accumulates of an image to come down to, in millions."""
    step: float = 0.1
    """Share of a group's channels that is taken at a time, from 0.01 to 1."""
    split: Literal["held_out", "val"] = "held_out"
    """Images whose loss decides. Of the validation images, accuracy says less once they have been chosen by."""

    def __post_init__(self) -> None:
        if not 0.0 < self.macs < math.inf:
            raise UserError(
                f"No network takes {self.macs:g} million multiply-accumulates: write for instance --macs 150."
            )
        if not 0.01 <= self.step <= 1.0:
            raise UserError(f"A step takes from 0.01 to all of the channels, not {self.step:g}: write --step 0.1.")


@dataclass(frozen=True, kw_only=True)
class AskCompare:
    """Accuracy over cost of several runs, measured before by pliant spectrum: one table, one picture."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the runs, as train named them."""
    to: Path = Path("comparison.png")
    """The picture."""


@dataclass(frozen=True, kw_only=True)
class AskExport(Ask):
    """An ordinary network at one point, with that point's batch-norm statistics, without anything of Pliant."""

    to: Path | None = None
    """Folder to write to; default: export/POINT in the run's folder."""
    formats: tuple[Literal["safetensors", "onnx", "torch"], ...] = ("safetensors", "onnx", "torch")
    """safetensors: weights under ordinary names. onnx: for other runtimes. torch: a torch.export program."""


@dataclass(frozen=True)
class AskCheckpoint:
    """What is there of a run's checkpoints: their steps and scores, and whether each is whole."""

    action: Annotated[Literal["list", "verify"], tyro.conf.Positional]
    """list: steps, scores and sizes. verify: reads every byte as well; status 2 if one is damaged."""
    run: Run
    """Folder of the run, as train named it."""


def parse_points(texts: Sequence[str]) -> list[Point]:
    """Points from the command line: single ones, and ranges low:step:high with both ends.

    Raises:
        UserError: a text is neither.
    """
    points: list[Point] = []
    for text in texts:
        if ":" not in text:
            points.append(parse_point(text))
            continue
        try:
            low, step, high = (float(part) for part in text.split(":"))
            count = round((high - low) / step)
        except (ValueError, ArithmeticError):
            count, low, step, high = -1, 0.0, 0.0, 0.0
        if count < 0 or abs(low + count * step - high) > 1e-6:
            raise UserError(
                f"{text!r} is no range of widths: write low:step:high, for instance 0.35:0.05:1.0."
            ) from None
        points += [Width(round(low + number * step, 6)) for number in range(count + 1)]
    return points
