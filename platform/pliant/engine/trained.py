"""A finished or running run, opened to be asked: its network at any point, calibrated, evaluated."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pliant import record
from pliant.aside import written_aside
from pliant.data import Feed, SplitName, thumbnails
from pliant.engine import checkpoint
from pliant.engine.agreement import heeded
from pliant.engine.batchnorm import (
    LayerStatistics,
    calibrate,
    impose,
    mean_over_ranks,
    running_buffers,
    twin,
    unflatten_,
)
from pliant.engine.evaluation import Rows, evaluate, shared_out
from pliant.engine.folder import RunFolder
from pliant.engine.interruption import Interruption, Stopped, listening
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.session import build_net, make_feed
from pliant.errors import Interrupted, UserError
from pliant.experiment import Calibration, Experiment
from pliant.images import Data
from pliant.recipe import Measurement, Point, Recipe

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A run's network and what it was trained with."""

    experiment: Experiment
    folder: RunFolder
    step: int
    """Steps that the network was trained for."""
    net: nn.Module
    """In evaluation mode: the averaged weights, if the run keeps an EMA."""
    feed: Feed
    ranks: Ranks
    size: int | None = None
    """Of the images, in pixels, where one was asked for."""
    interruption: Interruption = field(default_factory=Interruption)

    @property
    def recipe(self) -> Recipe:
        """The method."""
        return self.experiment.recipe

    def executed(self, execution: str) -> Trained:
        """The same run, its recipe's way of leaving blocks out replaced.

        Raises:
            UserError: its method leaves none out.
        """
        if not hasattr(self.recipe, "execution"):
            name = type(self.recipe).__name__
            raise UserError(f"{name} leaves no blocks out: write pliant spectrum without --execution.")
        recipe: Any = self.recipe
        recipe = dataclasses.replace(recipe, execution=execution)
        return dataclasses.replace(self, experiment=dataclasses.replace(self.experiment, recipe=recipe))

    def checked(self, points: Sequence[Point]) -> tuple[Point, ...]:
        """The points, or the recipe's own where none are given.

        Raises:
            UserError: the network cannot be asked for one of them.
        """
        for point in points:
            refusal = self.recipe.admits(point)
            if refusal is not None:
                raise UserError(refusal)
        return tuple(dict.fromkeys(points)) or self.recipe.points()

    def at(self, points: Sequence[Point], calibration: Calibration) -> dict[Point, nn.Module]:
        """Collective. The network at each point, with post-statistics measured now or kept from before."""
        as_trained = {point: twin(self.net) for point in points if not self.recipe.calibrates(point)}
        kept = {point: self._kept(point, calibration) for point in points if point not in as_trained}
        missing = [point for point, statistics in kept.items() if statistics is None]
        if missing:
            measured = self._calibrate(missing, calibration)
            kept |= measured
            if self.ranks.first:
                for point, statistics in measured.items():
                    self._keep(point, calibration, statistics)
        calibrated = {point: impose(self.net, statistics or {}) for point, statistics in kept.items()}
        return {point: as_trained.get(point) or calibrated[point] for point in points}

    def calibrated(self, points: Sequence[Point], calibration: Calibration) -> dict[Point, nn.Module]:
        """Collective. The network at each point, with post-statistics that are measured now and kept nowhere."""
        measured = self._calibrate(points, calibration)
        return {point: impose(self.net, measured[point]) for point in points}

    def _calibrate(
        self, points: Sequence[Point], calibration: Calibration
    ) -> Mapping[Point, dict[str, LayerStatistics]]:
        images, batch = calibration.images, calibration.batch
        number = self.feed.calibration_batches(images, batch)
        # Fewer batches than ranks: every rank runs all of them, which leaves weighted means as they are.
        rank, ranks = (self.ranks.rank, self.ranks.count) if number >= self.ranks.count else (0, 1)
        rounds = -(-number // ranks)
        seed = self.experiment.seed
        with self.feed.calibration(
            images=images, batch=batch, augment=calibration.augment, seed=seed, rank=rank, ranks=ranks
        ) as batches:
            return calibrate(
                self.recipe,
                self.net,
                points,
                heeded(((index, one.images) for index, one in batches), rounds, self.ranks, self.interruption),
                average=calibration.average,
                number=number,
                precision=Precision(self.experiment.precision, self.ranks.device),
                ranks=self.ranks,
            )

    def _path(self, point: Point, calibration: Calibration) -> Path:
        augment = "-augmented" if calibration.augment else ""
        images = self.feed.dataset.train.fingerprint.contents  # the dataset may be another than before
        name = f"{point.file_name}-{calibration.average}-{calibration.images}x{calibration.batch}{augment}"
        name += f"-{self.experiment.data.side}px-{images:08x}"
        return self.folder.path / "calibration" / f"step-{self.step:08d}" / f"{name}.safetensors"

    def _kept(self, point: Point, calibration: Calibration) -> dict[str, LayerStatistics] | None:
        flat = self.ranks.from_first(_statistics_in(self._path(point, calibration)) if self.ranks.first else None)
        if flat is None:
            return None
        names = dict.fromkeys(name.rsplit(".", 1)[0] for name in flat)
        return {name: LayerStatistics(flat[f"{name}.mean"], flat[f"{name}.var"]) for name in names}

    def _keep(self, point: Point, calibration: Calibration, statistics: Mapping[str, LayerStatistics]) -> None:
        path = self._path(point, calibration)
        path.parent.mkdir(parents=True, exist_ok=True)
        flat: dict[str, Tensor] = {}
        for name, layer in statistics.items():
            flat |= {f"{name}.mean": layer.mean.cpu().contiguous(), f"{name}.var": layer.var.cpu().contiguous()}
        with written_aside(path, flush=True, contended=True) as beside:
            beside.write_bytes(save(flat))  # a full disk is an OSError so

    def measure(
        self, nets: Mapping[Point, nn.Module], split: SplitName, rows: dict[Point, Rows] | None = None
    ) -> list[Measurement]:
        """Collective. Accuracy and cost at each point, each image decoded once; `rows` as in `evaluate`."""
        batch = self.experiment.batch.micro
        with shared_out(self.feed, split, batch, self.ranks, self.interruption) as batches:
            return evaluate(
                self.recipe,
                nets,
                batches,
                precision=Precision(self.experiment.precision, self.ranks.device),
                ranks=self.ranks,
                rows=rows,
            )


def open_run(
    path: Path, ranks: Ranks, *, which: str = "newest", root: Path | None = None, size: int | None = None
) -> Trained:
    """Collective. A run's network, from one of its checkpoints.

    Args:
        path: the run's folder.
        which: newest, best or a step, as `checkpoint.require` reads it.
        root: where the dataset lies now; default: where it lay.
        size: of the images, in pixels; default: as trained.

    Raises:
        UserError: the folder is no run, holds no whole checkpoint, or its checkpoint is of another network; or its
            images have one size.
    """
    experiment = record.load(path)
    if root is not None:
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, root=root))
    if size is not None:
        experiment = dataclasses.replace(experiment, data=experiment.data.at_size(size))
    found = checkpoint.require(RunFolder(path).checkpoints, which)
    feed = make_feed(experiment, ranks)
    if ranks.first:
        for note in feed.dataset.notes():
            _log.warning("Warning: %s", note)
    net = build_net(experiment, feed.dataset.num_classes, ranks.device)
    state = found.load()
    averaged = state["ema"] is not None
    checkpoint.load_weights(net, state["ema" if averaged else "net"], found.path)
    rows = state["ema_rows" if averaged else "rows"]
    unflatten_(running_buffers(net), mean_over_ranks(rows, experiment.batching(state["stage"]).micro_batches))
    return Trained(experiment, RunFolder(path), found.step, net.eval(), feed, ranks, size)


@contextmanager
def opened(path: Path, ranks: Ranks, **options: Any) -> Iterator[Trained]:
    """Collective. `open_run`; within it a signal stops all ranks together, between two batches.

    Raises:
        Interrupted: a signal came.
    """
    try:
        with listening() as interruption:
            yield dataclasses.replace(open_run(path, ranks, **options), interruption=interruption)
    except Stopped:
        raise Interrupted("Stopped on the way; what was measured before stands.") from None


_SHOWN = 16  # images of each end that a picture shows
_SPACED = 240  # images of which a picture may show those that share a policy
_PIXELS = 96  # the shorter side that they are kept with


def write_spectrum(
    trained: Trained,
    lines: Sequence[Measurement],
    calibration: Calibration | None,
    split: str,
    rows: Mapping[Point, Rows],
) -> Path:
    """Writes spectrum.json into the run's folder, and spectrum.npz where a method marks images; whole or not at all."""
    _write_rows(trained, rows, cast(SplitName, split))
    return write_measured(trained, "spectrum.json", lines, calibration, split, classes=bool(rows))


def write_measured(
    trained: Trained,
    name: str,
    lines: Sequence[Measurement],
    calibration: Calibration | None,
    split: str,
    *,
    classes: bool = False,
) -> Path:
    """Writes measurements into a file of the run's folder, whole or not at all, with what they are of.

    Args:
        calibration: None where no point is calibrated.
        classes: with the names of the classes.
    """
    data: Data = trained.experiment.data
    plain = {
        "name": trained.experiment.name,
        "method": type(trained.recipe).__name__,
        "step": trained.step,
        "dataset": str(data.root),
        "generated": trained.feed.dataset.generated,
        "size": trained.size,
        "classes": list(trained.feed.dataset.classes) if classes else [],
        "split": split,
        "fingerprint": dataclasses.asdict(trained.feed.dataset.split(cast(SplitName, split)).fingerprint),
        "calibration": None if calibration is None else dataclasses.asdict(calibration),
        "lines": [dataclasses.asdict(line) for line in lines],
    }
    path = trained.folder.path / name
    with written_aside(path, contended=True) as beside:
        beside.write_text(json.dumps(plain, indent=2) + "\n")
    return path


def _statistics_in(path: Path) -> dict[str, Tensor] | None:
    """What was kept there; None where nothing was, or what is there is torn and is measured anew."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def _write_rows(trained: Trained, rows: Mapping[Point, Rows], split: SplitName) -> None:
    """What each point found of each image; the images that cost least and most; and some of all, evenly spaced."""
    path = trained.folder.path / "spectrum.npz"
    path.unlink(missing_ok=True)
    if not rows:
        return
    kept = {f"{point}/{name}": values.numpy() for point, found in rows.items() for name, values in found.items()}
    for point, found in rows.items():
        if "macs" in found and "position" in found:
            right = found["right"].nonzero()[:, 0]
            order = right[found["macs"][right].argsort(stable=True)]
            for end, chosen in (("easiest", order[:_SHOWN]), ("hardest", order[-_SHOWN:].flip(0))):
                positions = found["position"][chosen].numpy()
                pictures, shown = thumbnails(trained.feed.dataset.split(split), positions, _PIXELS)
                kept[f"{point}/{end}"], kept[f"{point}/{end}_rows"] = pictures, chosen.numpy()[shown]
    images = trained.feed.dataset.split(split)
    spaced = np.unique(np.linspace(0, len(images) - 1, _SPACED).astype(np.int64))
    kept["spaced"], seen = thumbnails(images, spaced, _PIXELS)
    kept["spaced_positions"] = spaced[seen]
    with written_aside(path, contended=True) as beside:
        np.savez_compressed(beside, **kept)  # type: ignore[arg-type] # its stub takes them for flags
