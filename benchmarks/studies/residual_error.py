"""Eq. 3 of US-Nets on trained networks: how far the sum over a layer's first k inputs is from the sum over all n.

    python benchmarks/studies/residual_error.py RUN RUN

The inequality bounds each feature's error by that at fewer inputs. No arithmetic makes it so; this measures how far
training did. Runs of width, each asked at its largest one, on statistics of its own. Last line JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

from pliant.engine.ranks import Ranks
from pliant.engine.trained import open_run
from pliant.errors import UserError
from pliant.networks.slimmable import SlimmableConv2d, SlimmableLinear

ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    root: Path | None = None
    """Where the dataset lies now, if it has moved."""
    images: int = 64
    """Of validation."""
    shares: tuple[float, ...] = (0.35, 0.5, 0.65, 0.8, 0.9)
    """Shares of the inputs that are summed over, smallest first."""


@dataclass(frozen=True)
class Sums:
    """What one layer's features come to, over all images and places."""

    errors: Tensor
    """Mean |y^n - y^k| over mean |y^n|, one for each share."""
    falls: float
    """Share of the features whose error is no larger at a share than at the one before, over all pairs."""
    bounded: float
    """Share of them whose error is no larger than at the smallest share."""


def sums(layer: nn.Module, x: Tensor, shares: tuple[float, ...]) -> Sums:
    """Of a layer with inputs x, (B, C, ...)."""
    whole = layer(x)
    deltas = torch.stack([(whole - layer(x[:, : max(1, round(share * x.shape[1]))])).abs() for share in shares])
    inner = deltas[1:]
    errors = deltas.flatten(1).mean(1) / whole.abs().mean()
    return Sums(errors, (inner <= deltas[:-1]).double().mean().item(), (inner <= deltas[0]).double().mean().item())


def summing(net: nn.Module) -> Iterator[nn.Module]:
    """The layers that sum over the channels of a slimmable input."""
    for layer in net.modules():
        if isinstance(layer, SlimmableLinear) or (
            isinstance(layer, SlimmableConv2d) and layer.groups == 1 and layer.in_channels > 3
        ):
            yield layer


@torch.inference_mode()
def measure(run: Path, settings: Settings) -> dict[str, Any]:
    """Means over the layers of a run's network."""
    trained = open_run(run, ALONE, root=settings.root)
    widest = max(trained.recipe.points(), key=lambda point: trained.recipe.parameters_at(trained.net, point))
    net = trained.at([widest], trained.experiment.calibration)[widest]
    inputs: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks, trained.feed.evaluation("val", batch=settings.images) as batches:
        for layer in summing(net):
            hooks.enter_context(layer.register_forward_pre_hook(lambda layer, given: inputs.update({layer: given[0]})))
        trained.recipe.predict(net, next(batches).images, widest)
    if not inputs:
        raise UserError(f"{run} has no layers that run on their first inputs: write the folder of a run of width.")
    found = [sums(layer, x, settings.shares) for layer, x in inputs.items()]
    return {
        "run": trained.experiment.name,
        "layers": len(found),
        "errors": [round(one, 4) for one in torch.stack([one.errors for one in found]).mean(0).tolist()],
        "falls": round(sum(one.falls for one in found) / len(found), 4),
        "bounded": round(sum(one.bounded for one in found) / len(found), 4),
    }


def main(settings: Settings) -> None:
    results = [measure(run, settings) for run in settings.runs]
    shares = (f"{share:g} n" for share in settings.shares)
    table = Table(Column("run", overflow="fold"), *shares, "falls", "bounded by the smallest")
    for run, one in zip(settings.runs, results, strict=True):
        kept = (f"{one['falls']:.1%}", f"{one['bounded']:.1%}")
        table.add_row(str(run), *(f"{error:.3f}" for error in one["errors"]), *kept)
    Console().print("Mean |y^n - y^k| over mean |y^n|, and the share of features that keep to Eq. 3", table)
    print(json.dumps({"shares": settings.shares, "runs": results}))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
