"""The command line: `pliant train|spectrum|compare|calibrate|slim|export|checkpoint|data`, and the end of recipe files.

A user's mistake is one sentence on stderr and exit status 2.
"""

from __future__ import annotations

import os

# Before torch starts its threads. Those that wait spin long by default, which slows a shared machine down several
# times; if they slept at once, an idle machine would take half as long again.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from pliant.asks import Ask, AskCheckpoint, AskCompare, AskExport, AskSlim, AskSpectrum, parse_points
from pliant.errors import EXIT_USER_ERROR, Interrupted, UserError
from pliant.experiment import Experiment
from pliant.guard import guarded

if TYPE_CHECKING:
    from pliant.engine.ranks import Ranks

_COMMANDS = {
    "train": "train a recipe file: pliant train recipes/usnet_mbv2.py --data.root /imagenet",
    "spectrum": "accuracy and cost of a run's network at many points: pliant spectrum RUN",
    "compare": "several runs' spectra in one table and picture: pliant compare RUN RUN",
    "calibrate": "batch-norm statistics of points: pliant calibrate RUN --at 0.5",
    "slim": "widths for each group of layers, at a cost: pliant slim RUN --macs 150",
    "checkpoint": "list or verify a run's checkpoints: pliant checkpoint verify RUN",
    "export": "an ordinary network at one point: pliant export RUN --at 0.5",
    "data": "unpack, shard, split or verify a dataset: pliant data --help",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The `pliant` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else "--help"
    if command == "train":
        guarded(lambda: _train_command(given[1:]))
    elif command == "spectrum":
        guarded(lambda: _spectrum_command(tyro.cli(AskSpectrum, args=given[1:], prog="pliant spectrum")))
    elif command == "calibrate":
        guarded(lambda: _calibrate(tyro.cli(Ask, args=given[1:], prog="pliant calibrate")))
    elif command == "checkpoint":
        guarded(lambda: _checkpoint(given[1:]))
    elif command == "slim":
        guarded(lambda: _slim(tyro.cli(AskSlim, args=given[1:], prog="pliant slim")))
    elif command == "export":
        guarded(lambda: _export(tyro.cli(AskExport, args=given[1:], prog="pliant export")))
    elif command == "compare":
        guarded(lambda: _compare(tyro.cli(AskCompare, args=given[1:], prog="pliant compare")))
    elif command == "data":
        guarded(lambda: _data(given[1:]))
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
    guarded(lambda: _train(experiment, Path(recipe_file), None, show=show))


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
            try:
                spectrum(AskSpectrum(run=run), ranks)
            except Interrupted as stop:
                raise Interrupted(str(stop), command=("pliant", "spectrum", str(run))) from None
        elif ranks.first:
            from pliant.engine.launch import program

            print(f"Done. Its spectrum: {program('pliant')} spectrum {run}")


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

    with opened(ask.run, ranks, which=ask.checkpoint, root=ask.root, size=ask.size) as trained:
        if ask.execution is not None:
            trained = trained.executed(ask.execution)
        points = trained.checked(parse_points(ask.at))
        split: Any = ask.split
        if split == "auto":
            split = "held_out" if trained.feed.dataset.val is None else "val"
        trained.feed.dataset.split(split)  # refuses one that is not there, before anything is calibrated
        calibrated = [point for point in points if trained.recipe.calibrates(point)]
        calibration = ask.calibration(trained.experiment.calibration, needed=bool(calibrated))
        rows: dict[Any, Any] = {}
        lines = trained.measure(trained.at(points, calibration), split, rows)
        if not trained.ranks.first:
            return
        write_spectrum(trained, lines, calibration if calibrated else None, split, rows)
    measured = report.read(ask.run)
    picture = report.draw(measured, ask.run / "spectrum.png")
    report.scalars(measured, ask.run)
    console = Console()
    console.print(report.table(measured))
    for path in (picture, *blocks.draw(ask.run)):
        console.print(f"picture: {path}", soft_wrap=True, highlight=False)


def _compare(ask: AskCompare) -> None:
    from rich.console import Console

    from pliant.report import comparison

    if ask.to.suffix != ".png" or not ask.to.absolute().parent.is_dir():
        raise UserError(f"{ask.to} is no place for a picture: write --to with a file that ends in .png.")
    spectra = comparison.read_all(ask.runs)
    console = Console()
    console.print(comparison.table(spectra))
    console.print(f"picture: {comparison.draw(spectra, ask.to)}", soft_wrap=True, highlight=False)


def _calibrate(ask: Ask) -> None:
    from pliant.engine.ranks import joined
    from pliant.engine.trained import opened

    with joined() as ranks, opened(ask.run, ranks, which=ask.checkpoint, root=ask.root, size=ask.size) as trained:
        points = trained.checked(parse_points(ask.at))
        calibrated = [str(point) for point in points if trained.recipe.calibrates(point)]
        trained.at(points, ask.calibration(trained.experiment.calibration, needed=bool(calibrated)))
        if trained.ranks.first:
            done = f"Calibrated {', '.join(calibrated)}, in {trained.folder.path / 'calibration'}"
            print(done if calibrated else "Nothing to calibrate: the network's own running statistics serve.")


def _slim(ask: AskSlim) -> None:
    from pliant.engine.launch import program
    from pliant.engine.ranks import joined
    from pliant.engine.slimming import slim
    from pliant.engine.trained import opened, write_measured
    from pliant.report.spectrum import millions

    with joined() as ranks, opened(ask.run, ranks, which=ask.checkpoint, root=ask.root, size=ask.size) as trained:
        if ask.split == "held_out" and trained.feed.dataset.held_out is None:
            raise UserError(
                "This run holds no images out to choose by: train with --data.held-out 1000, or write --split val, and "
                "accuracy on the validation images then says less."
            )
        trained.feed.dataset.split(ask.split)
        calibration = ask.calibration(trained.experiment.calibration, needed=True)
        lines = []
        for line in slim(trained, calibration, ask.split, macs=ask.macs * 1e6, step=ask.step):
            lines.append(line)
            if ranks.first:
                print(f"{millions(line.macs)} M multiply-accumulates, top-1 {line.top1:.2%}, loss {line.loss:.4f}")
                path = write_measured(trained, "slimming.json", lines, calibration, ask.split)
        if ranks.first:
            again = shlex.join(("spectrum", str(ask.run), "--at", line.point, *ask.options()))
            print(f"On the way: {path}\nIts spectrum: {program('pliant')} {again}")


def _export(ask: AskExport) -> None:
    from pliant.engine.ranks import joined
    from pliant.engine.trained import opened
    from pliant.export import export, require_packages

    require_packages(ask.formats)
    points = parse_points(ask.at)
    if len(points) != 1:
        raise UserError(f"An export is of one point, and {len(points)} were given: write for instance --at 0.5.")
    with joined() as ranks, opened(ask.run, ranks, which=ask.checkpoint, root=ask.root, size=ask.size) as trained:
        (point,) = trained.checked(points)
        calibration = ask.calibration(trained.experiment.calibration, needed=trained.recipe.calibrates(point))
        net = trained.at([point], calibration)[point]
        folder = ask.to or ask.run / "export" / (point.file_name + ("" if ask.size is None else f"-{ask.size}px"))
        for path in export(trained, net, point, folder, ask.formats):
            print(path)


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
        state = "damaged" if isinstance(one, str) else "whole, end of a stage" if one.lasting else "whole"
        table.add_row(path.name, score, f"{size:.1f}", state)
    Console().print(table)
    damaged = [one for one in found if isinstance(one, str)]
    if damaged:
        raise UserError(f"{'; '.join(damaged)}. A run that is resumed steps over it.")


def _data(arguments: Sequence[str]) -> None:
    from pliant.preparation.command import data_command

    data_command(arguments)
