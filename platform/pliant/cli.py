"""The command line: `pliant train|spectrum|calibrate|export|checkpoint|data`, and the end of every recipe file.

A user's mistake is one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import os

# Before torch starts its threads. Those that wait spin long by default, which slows a shared machine down several
# times; if they slept at once, an idle machine would take half as long again.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pliant.errors import EXIT_INTERRUPTED, EXIT_RANKS_LOST, EXIT_USER_ERROR, Interrupted, RanksLost, UserError
from pliant.experiment import Calibration, Experiment
from pliant.recipe import Point, Width, parse_point

if TYPE_CHECKING:
    from pliant.engine.ranks import Ranks

_COMMANDS = {
    "train": "train a recipe file: pliant train recipes/usnet_mbv2.py --data.root /imagenet",
    "spectrum": "accuracy and cost of a run's network at many points: pliant spectrum RUN",
    "calibrate": "batch-norm statistics of points: pliant calibrate RUN --at 0.5",
    "checkpoint": "list or verify a run's checkpoints: pliant checkpoint verify RUN",
    "export": "an ordinary network at one point: pliant export RUN --at 0.5",
    "data": "unpack, shard, split or verify a dataset: pliant data --help",
}

Run = Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Which network of a run, at which points, on which images."""

    run: Run
    """Folder of the run, as train named it."""
    at: tuple[str, ...] = ()
    """Points, for instance 0.35 0.5 1.0, or a range with its step: 0.35:0.05:1.0. Default: the recipe's own."""
    checkpoint: str = "newest"
    """newest, best (by the held-out split), or the step of one that was kept."""
    root: Path | None = None
    """Where the dataset lies now, if it has moved."""
    images: int | None = None
    """Training images to calibrate batch norm on, 0 for all; default: as the run's experiment says."""
    average: Literal["pooled", "cumulative", "moving"] | None = None
    """How their statistics are averaged; default: as the run's experiment says."""
    augment: bool | None = None
    """Whether they are augmented as in training; default: as the run's experiment says."""

    def calibration(self, default: Calibration) -> Calibration:
        """The run's calibration with what was asked for in its place."""
        asked = {name: value for name in ("images", "average", "augment") if (value := getattr(self, name)) is not None}
        return dataclasses.replace(default, **asked)


@dataclass(frozen=True, kw_only=True)
class AskSpectrum(Ask):
    """Accuracy and cost of a run's network at many points, each image decoded once for all of them."""

    split: Literal["auto", "val", "held_out"] = "auto"
    """Which images; auto: the validation images, or the held-out ones where there are none."""
    execution: Literal["masked", "grouped"] | None = None
    """How a network on depth leaves blocks out (methods on depth); default: as the run's recipe says."""


@dataclass(frozen=True, kw_only=True)
class AskExport(Ask):
    """An ordinary network at one point, its statistics folded in, without anything of Pliant."""

    to: Path | None = None
    """Folder to write to; default: export/POINT in the run's folder."""
    formats: tuple[Literal["safetensors", "onnx", "torch"], ...] = ("safetensors", "onnx", "torch")
    """safetensors: weights under ordinary names. onnx: for other runtimes. torch: a torch.export program."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The `pliant` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else "--help"
    if command == "train":
        _guard(lambda: _train_command(given[1:]))
    elif command == "spectrum":
        _guard(lambda: _spectrum_command(tyro.cli(AskSpectrum, args=given[1:], prog="pliant spectrum")))
    elif command == "calibrate":
        _guard(lambda: _calibrate(tyro.cli(Ask, args=given[1:], prog="pliant calibrate")))
    elif command == "checkpoint":
        _guard(lambda: _checkpoint(given[1:]))
    elif command == "export":
        _guard(lambda: _export(tyro.cli(AskExport, args=given[1:], prog="pliant export")))
    elif command == "data":
        _guard(lambda: _data(given[1:]))
    else:
        lines = "\n".join(f"  {name:<10} {text}" for name, text in _COMMANDS.items())
        asked = command in ("-h", "--help")
        print(
            f"usage: pliant COMMAND …\n\n{lines}\n\npliant COMMAND --help says more.",
            file=sys.stdout if asked else sys.stderr,
        )
        sys.exit(0 if asked else EXIT_USER_ERROR)


def run(experiment: Experiment, recipe_file: str, *, show: bool = False) -> None:
    """The end of a recipe file: reads the command line over the file's experiment, and trains.

    Args:
        recipe_file: the file itself, kept in the run's folder.
        show: measure the spectrum afterwards.
    """
    _guard(lambda: _train(experiment, Path(recipe_file), None, show=show))


def _train_command(arguments: Sequence[str]) -> None:
    from pliant import record

    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            "pliant train needs a recipe file first: write for instance pliant train recipes/usnet_mbv2.py."
        )
    path = Path(arguments[0])
    experiment = getattr(record.load_recipe_file(path), "EXPERIMENT", None)
    if not isinstance(experiment, Experiment):
        raise UserError(
            f"{path} is no recipe file: it must hold EXPERIMENT = Experiment(...), as those in recipes/ do."
        )
    _train(experiment, path, arguments[1:], show=False)


def _train(experiment: Experiment, recipe_file: Path, arguments: Sequence[str] | None, *, show: bool) -> None:
    asked = tyro.cli(Experiment, default=experiment, args=arguments, description=f"Train {experiment.name}.")
    from pliant.engine.ranks import joined  # torch and all: only once the command line is known to be right
    from pliant.engine.session import train

    with joined(asked.ranks) as ranks:
        run = train(asked, ranks, recipe_file).path
        if show:
            spectrum(AskSpectrum(run=run), ranks)
        elif ranks.first:
            print(f"Done. Its spectrum: pliant spectrum {run}")


def _spectrum_command(ask: AskSpectrum) -> None:
    from pliant.engine.ranks import joined

    with joined() as ranks:
        spectrum(ask, ranks)


def spectrum(ask: AskSpectrum, ranks: Ranks) -> None:
    """Collective. Measures, prints a table, writes spectrum.json and spectrum.png and TensorBoard's scalars."""
    from rich.console import Console

    from pliant.engine.trained import opened, write_spectrum
    from pliant.report import blocks
    from pliant.report import spectrum as report

    with opened(ask.run, ranks, which=ask.checkpoint, root=ask.root) as trained:
        if ask.execution is not None:
            trained = trained.executed(ask.execution)
        points = trained.checked(parse_points(ask.at))
        split: Any = ask.split
        if split == "auto":
            split = "held_out" if trained.feed.dataset.val is None else "val"
        calibration = ask.calibration(trained.experiment.calibration)
        rows: dict[Point, Any] = {}
        lines = trained.measure(trained.at(points, calibration), split, rows)
        if not trained.ranks.first:
            return
        write_spectrum(trained, lines, calibration, split, rows)
    measured = report.read(ask.run)
    picture = report.draw(measured, ask.run / "spectrum.png")
    report.scalars(measured, ask.run)
    console = Console()
    console.print(report.table(measured))
    for path in (picture, *blocks.draw(ask.run)):
        console.print(f"picture: {path}", soft_wrap=True, highlight=False)


def _calibrate(ask: Ask) -> None:
    from pliant.engine.ranks import joined
    from pliant.engine.trained import opened

    with joined() as ranks, opened(ask.run, ranks, which=ask.checkpoint, root=ask.root) as trained:
        points = trained.checked(parse_points(ask.at))
        trained.at(points, ask.calibration(trained.experiment.calibration))
        if trained.ranks.first:
            print(f"Calibrated {', '.join(map(str, points))}, in {trained.folder.path / 'calibration'}")


def _export(ask: AskExport) -> None:
    from pliant.engine.ranks import joined
    from pliant.engine.trained import opened
    from pliant.export import export

    points = parse_points(ask.at)
    if len(points) != 1:
        raise UserError(f"An export is of one point, and {len(points)} were given: write for instance --at 0.5.")
    with joined() as ranks, opened(ask.run, ranks, which=ask.checkpoint, root=ask.root) as trained:
        (point,) = trained.checked(points)
        net = trained.at([point], ask.calibration(trained.experiment.calibration))[point]
        folder = ask.to or ask.run / "export" / point.file_name
        for path in export(trained, net, point, folder, ask.formats):
            print(path)


@dataclass(frozen=True)
class AskCheckpoint:
    """What is there of a run's checkpoints: their steps and scores, and whether each is whole."""

    action: Annotated[Literal["list", "verify"], tyro.conf.Positional]
    """list: steps, scores and sizes. verify: reads every byte as well; status 2 if one is damaged."""
    run: Run
    """Folder of the run, as train named it."""


def _checkpoint(arguments: Sequence[str]) -> None:
    ask = tyro.cli(AskCheckpoint, args=arguments, prog="pliant checkpoint")
    from rich.console import Console
    from rich.table import Table

    from pliant.engine import checkpoint
    from pliant.engine.folder import RunFolder

    folders = checkpoint.folders(RunFolder(ask.run).checkpoints)
    if not folders:
        raise UserError(f"{ask.run} holds no checkpoint: write the folder of a run, for instance runs/NAME/TIME.")
    found = [checkpoint.verify(path, contents=ask.action == "verify") for path in folders]
    table = Table("checkpoint", "score", "MB", "state" if ask.action == "list" else "state, every byte read")
    for path, one in zip(folders, found, strict=True):
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file()) / 1e6
        score = "" if isinstance(one, str) or one.score is None else f"{one.score:.4f}"
        table.add_row(path.name, score, f"{size:.1f}", "damaged" if isinstance(one, str) else "whole")
    Console().print(table)
    damaged = [one for one in found if isinstance(one, str)]
    if damaged:
        raise UserError(f"{'; '.join(damaged)}. A run that is resumed steps over it.")


def _data(arguments: Sequence[str]) -> None:
    from pliant.preparation.command import data_command

    data_command(arguments)


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


def _guard(action: Callable[[], None]) -> None:
    """Runs it, its log on stderr; what a user can mend becomes a sentence and an exit status."""
    try:
        with _heard():
            action()
    except (UserError, RanksLost) as error:
        prefix = "" if _rank() == "0" else f"rank {_rank()}: "
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RANKS_LOST)
    except Interrupted as stop:
        if _rank() == "0":
            print(f"{stop}\nGo on with: {_again(sys.argv)}", flush=True)
        sys.exit(EXIT_INTERRUPTED)
    except KeyboardInterrupt:  # before the run listens for signals, or after it
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _heard() -> Iterator[None]:
    """Shows what parts without a place of their own to speak say: that a long scan gets on, for instance."""
    logger, handler = logging.getLogger("pliant"), logging.StreamHandler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _rank() -> str:
    """This process's rank, once it has joined the others."""
    return os.environ.get("RANK", "0")


def _again(arguments: Sequence[str]) -> str:
    """The command that goes on with this one."""
    if Path(arguments[0]).name == "pliant" and arguments[1:2] != ["train"]:
        return shlex.join(["pliant", *arguments[1:]])
    kept = [text for text in arguments if not text.startswith("--resume=")]
    if "--resume" in kept:
        place = kept.index("--resume")
        del kept[place : place + 2]
    ranks = os.environ.get("WORLD_SIZE", "1")
    program = ["pliant"] if Path(kept[0]).name == "pliant" else ["python", kept[0]]
    if ranks != "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        program = ["accelerate", "launch", "--multi_gpu", "--num_processes", ranks, kept[0]]
    elif ranks != "1":
        program = ["torchrun", "--nproc_per_node", ranks, kept[0]]
    return shlex.join([*program, *kept[1:], "--resume", "auto"])
