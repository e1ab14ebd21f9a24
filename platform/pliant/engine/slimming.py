"""A greedy search for the widths that lose least at a cost: network slimming on a network that is trained already
(US-Nets section 6 and abstract), for any recipe that says which points lie a step below another."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from pliant.data import SplitName
from pliant.engine.trained import Trained
from pliant.errors import UserError
from pliant.experiment import Calibration
from pliant.recipe import Measurement, Point, Recipe


def slim(
    trained: Trained, calibration: Calibration, split: SplitName, *, macs: float, step: float
) -> Iterator[Measurement]:
    """Collective. The measurements on the way down: first the one with the most parameters, last the first one whose
    multiply-accumulates are `macs` or fewer.

    In each round every point a step below is calibrated and measured, and that one is gone on from which adds least to
    the loss for each multiply-accumulate that it saves; where some add nothing, the one that takes most from it and
    saves most.

    Args:
        split: the images whose loss decides.
        macs: per image.
        step: share of a layer's channels that is taken at a time, in (0, 1].

    Raises:
        UserError: the recipe knows no points below another, or none is so cheap.
    """
    recipe, net = trained.recipe, trained.net
    here = max(recipe.points(), key=lambda point: recipe.parameters_at(net, point))
    bottom = _bottom(recipe, net, here)
    line, least = trained.measure(trained.calibrated((here, bottom), calibration), split)
    if _cost(least) > macs:
        raise UserError(
            f"The narrowest network takes {math.ceil(_cost(least) / 1e4) / 100:.2f} million multiply-accumulates, and "
            f"{macs / 1e6:g} were asked for: write as much as --macs, or more."
        )
    yield line
    while _cost(line) > macs:
        nets = trained.calibrated(recipe.narrower(net, here, step), calibration)
        lines = dict(zip(nets, trained.measure(nets, split), strict=True))
        here = min(lines, key=lambda point, before=line: _price(before, lines[point]))  # type: ignore[misc]
        line = lines[here]
        yield line


def _bottom(recipe: Recipe, net: nn.Module, point: Point) -> Point:
    """The cheapest point that the search can come to."""
    below = recipe.narrower(net, point, 1.0)
    if not below:
        raise UserError(
            f"{type(recipe).__name__} has no points that lie below its largest one in one place alone: there is "
            "nothing to slim in this run, as in a US-Net of several widths there would be."
        )
    while below:
        point = below[0]
        below = recipe.narrower(net, point, 1.0)
    return point


def _price(before: Measurement, after: Measurement) -> float:
    """Loss for each multiply-accumulate saved, or, where the loss falls, by how much, times what is saved."""
    added, saved = after.loss - before.loss, _cost(before) - _cost(after)
    return added / saved if added > 0 else added * saved


def _cost(line: Measurement) -> float:
    assert line.macs is not None
    return line.macs
