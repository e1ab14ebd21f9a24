"""SkipNet's gates at other thresholds than one half: accuracy over blocks of trained runs (Table 3: at equal cost,
gates that were trained hard are far better than gates that were trained soft).

    python benchmarks/studies/gate_thresholds.py RUN RUN --checkpoints newest 175

Networks that all end with every block open cannot be compared at one half. A threshold for all gates of a run, higher
and higher, closes blocks until none but the first is left. All validation images. Last line JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pliant.engine.ranks import Ranks
from pliant.engine.trained import open_run
from pliant.errors import UserError
from pliant.methods.skipnet import SkipNet
from pliant.networks.gated import GatedNet, Walk, threshold

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is asked."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of SkipNet's runs."""
    checkpoints: tuple[str, ...] = ()
    """Of each run, which; default: the newest."""
    root: Path | None = None
    """Where the dataset lies now, if it has moved."""
    steps: int = 14
    """Thresholds between one half and the last block's closing."""


def above(least: float) -> Callable[[int, Tensor], Tensor]:
    """Gates that open from a logit of `least` on."""
    return lambda number, logits: (logits >= least).to(logits)


@torch.inference_mode()
def measure(run: Path, checkpoint: str, settings: Settings) -> dict[str, Any]:
    """Blocks and top-1 at one half, then at rising thresholds."""
    trained = open_run(run, ALONE, which=checkpoint, root=settings.root)
    net, recipe = cast(GatedNet, trained.net), trained.recipe
    if not isinstance(recipe, SkipNet):
        raise UserError(f"{run} is no run of SkipNet: it has no gates that a threshold opens.")
    with trained.feed.evaluation("val", batch=500) as batches:
        held = [(batch.images, batch.labels) for batch in batches]
    images_in_all = sum(len(labels) for _, labels in held)
    walks: list[Walk] = [net(images, threshold, recipe.executed()) for images, _ in held]
    logits = torch.cat([walk.gate_logits for walk in walks]).flatten().sort().values
    logits = logits[logits > 0]
    places = torch.linspace(0, len(logits) - 1, settings.steps + 1).long()[1:]
    found = []
    for least in (0.0, *logits[places].tolist()):
        right = blocks = 0.0
        for images, labels in held:
            walk = net(images, above(least), recipe.executed())
            right += (walk.logits.argmax(1) == labels).sum().item()
            blocks += walk.open.sum().item()
        probability = torch.tensor(least).sigmoid().item()
        found.append(
            {
                "threshold": round(probability, 5),
                "blocks": round(blocks / images_in_all, 3),
                "top1": round(right / images_in_all, 4),
            }
        )
    return {"run": trained.experiment.name, "learning": recipe.learning, "step": trained.step, "points": found}


def main(settings: Settings) -> None:
    checkpoints = settings.checkpoints or ("newest",) * len(settings.runs)
    if len(checkpoints) != len(settings.runs):
        raise UserError(f"{len(settings.runs)} runs have {len(checkpoints)} checkpoints: write one for each.")
    results = [measure(run, one, settings) for run, one in zip(settings.runs, checkpoints, strict=True)]
    for run, result in zip(settings.runs, results, strict=True):
        table = Table("threshold", "blocks", "top-1 %", title=f"{run}, {result['learning']}, step {result['step']}")
        for one in result["points"]:
            table.add_row(f"{one['threshold']:.4f}", f"{one['blocks']:.2f}", f"{100 * one['top1']:.2f}")
        Console().print(table)
    print(json.dumps(results))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
