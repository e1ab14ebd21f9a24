"""Accuracy and cost of a network at many points, each image decoded once for all of them.

Every image counts exactly once over any number of ranks: sums are added up, never means averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.recipe import Batch, Measurement, Outcome, Point, Recipe


@torch.no_grad()
def evaluate(
    recipe: Recipe,
    nets: Mapping[Point, nn.Module],
    batches: Iterable[Batch],
    *,
    precision: Precision,
    ranks: Ranks,
) -> list[Measurement]:
    """Collective. One measurement per point, in the order of `nets`.

    Args:
        nets: the network to ask at each point, in evaluation mode with that point's statistics.
        batches: this rank's share of the images.
    """
    sums = {point: torch.zeros(6, dtype=torch.float64, device=ranks.device) for point in nets}
    marks: dict[Point, list[Mapping[str, Tensor]]] = {point: [] for point in nets}
    costs: dict[Point, float] = {}
    for batch in batches:
        for point, net in nets.items():
            if point not in costs:
                costs[point] = macs_of_image(recipe, net, batch.images[:1], point)
            with precision.autocast():
                outcome = recipe.predict(net, batch.images, point)
            sums[point] += _tally(outcome, batch.labels, costs[point])
            if outcome.marks:
                marks[point].append({name: values.cpu() for name, values in outcome.marks.items()})
    table = ranks.sum_(torch.stack(list(sums.values())))
    return [
        _measurement(recipe, point, nets[point], row.tolist(), _joined(marks[point], ranks))
        for point, row in zip(nets, table, strict=True)
    ]


def macs_of_image(recipe: Recipe, net: nn.Module, image: Tensor, point: Point) -> float:
    """Multiply-accumulates of one image (1, 3, H, W) at a point, counted on the operators that really run."""
    with FlopCounterMode(display=False) as counter:
        recipe.predict(net, image, point)
    return float(counter.get_total_flops()) / 2


def _tally(outcome: Outcome, labels: Tensor, cost: float) -> Tensor:
    """(6,): images, right at first, right among five, summed loss, summed MACs, and their squares."""
    logits = outcome.logits.float()
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    images = len(labels)
    macs = torch.full((images,), cost, dtype=torch.float64) if outcome.macs is None else outcome.macs.double()
    loss = cross_entropy(logits, labels, reduction="sum").double()
    values = (images, hits[:, 0].sum(), hits.sum(), loss, macs.sum(), macs.square().sum())
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=logits.device) for value in values])


def _joined(marks: Sequence[Mapping[str, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """Collective. Each mark of all images on all ranks, one row per image."""
    own = {name: torch.cat([one[name] for one in marks]) for name in (marks[0] if marks else {})}
    every = [one for one in ranks.all(own) if one]
    return {name: torch.cat([one[name] for one in every]) for name in (every[0] if every else {})}


def _measurement(
    recipe: Recipe, point: Point, net: nn.Module, sums: list[float], marks: Mapping[str, Tensor]
) -> Measurement:
    images, top1, top5, loss, macs, squares = sums
    count = max(images, 1)
    varies = squares / count - (macs / count) ** 2
    return Measurement(
        point=str(point),
        images=int(images),
        top1=top1 / count,
        top5=top5 / count,
        loss=loss / count,
        macs=macs / count,
        parameters=recipe.parameters_at(net, point),
        macs_sd=math.sqrt(varies) if marks and varies > 0 else None,
        figures=recipe.figures(marks) if marks else {},
    )
