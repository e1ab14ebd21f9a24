"""Accuracy and cost of a network at many points, each image decoded once for all of them.

Every image counts exactly once over any number of ranks: sums are added up, never means averaged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from pliant.data import Feed, SplitName
from pliant.engine.agreement import heeded
from pliant.engine.interruption import Interruption
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.recipe import Batch, Measurement, Outcome, Point, Recipe

Rows = dict[str, Tensor]
"""By name, one row per image: position in its split, label, right, macs, and the method's marks."""


@contextmanager
def shared_out(
    feed: Feed, split: SplitName, batch: int, ranks: Ranks, interruption: Interruption
) -> Iterator[Iterator[Batch]]:
    """Collective. This rank's batches of a split.

    Raises:
        Stopped: (from the iterator) asked to stop, on all ranks at the same batch.
    """
    rounds = -(-feed.evaluation_batches(split, batch) // ranks.count)
    with feed.evaluation(split, batch=batch, rank=ranks.rank, ranks=ranks.count) as batches:
        yield heeded(batches, rounds, ranks, interruption)


@torch.no_grad()
def evaluate(
    recipe: Recipe,
    nets: Mapping[Point, nn.Module],
    batches: Iterable[Batch],
    *,
    precision: Precision,
    ranks: Ranks,
    rows: dict[Point, Rows] | None = None,
) -> list[Measurement]:
    """Collective. One measurement per point, in the order of `nets`.

    Args:
        nets: the network to ask at each point, in evaluation mode with that point's statistics.
        batches: this rank's share of the images.
        rows: filled, where given, with what each point found of each image, if the method marks images.
    """
    sums = {point: torch.zeros(6, dtype=torch.float64, device=ranks.device) for point in nets}
    found: dict[Point, list[Rows]] = {point: [] for point in nets}
    costs: dict[Point, float] = {}
    for batch in batches:
        for point, net in nets.items():
            if point not in costs:
                costs[point] = macs_of_image(recipe, net, batch.images[:1], point)
            with precision.autocast():
                outcome = recipe.predict(net, batch.images, point)
            sums[point] += _tally(outcome, batch.labels, costs[point])
            if outcome.marks:
                found[point].append(_rows(outcome, batch))
    table = ranks.sum_(torch.stack(list(sums.values())))
    lines = []
    for (point, net), row in zip(nets.items(), table, strict=True):
        joined = _joined(found[point], ranks)
        lines.append(_measurement(recipe, point, net, row.tolist(), joined))
        if rows is not None and joined:
            rows[point] = joined
    return lines


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
    # All of it on the device: a number handed over would wait for what runs there.
    macs = logits.new_full((images,), cost, dtype=torch.float64) if outcome.macs is None else outcome.macs.double()
    loss = cross_entropy(logits, labels, reduction="sum")
    count = logits.new_full((), images, dtype=torch.float64)
    values = (count, hits[:, 0].sum(), hits.sum(), loss, macs.sum(), macs.square().sum())
    return torch.stack([value.double() for value in values])


def _rows(outcome: Outcome, batch: Batch) -> Rows:
    """What is known of each image of a batch, on the CPU."""
    right = outcome.logits.argmax(1) == batch.labels
    rows = {"label": batch.labels, "right": right, **outcome.marks}
    positions = getattr(batch, "positions", None)
    if positions is not None:
        rows["position"] = positions
    if outcome.macs is not None:
        rows["macs"] = outcome.macs
    return {name: values.cpu() for name, values in rows.items()}


def _joined(parts: Sequence[Rows], ranks: Ranks) -> Rows:
    """Collective. The rows of all images on all ranks."""
    own = {name: torch.cat([one[name] for one in parts]) for name in (parts[0] if parts else {})}
    every = [one for one in ranks.all(own) if one]
    return {name: torch.cat([one[name] for one in every]) for name in (every[0] if every else {})}


def _measurement(recipe: Recipe, point: Point, net: nn.Module, sums: list[float], rows: Rows) -> Measurement:
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
        macs_sd=math.sqrt(max(0.0, varies)) if "macs" in rows else None,
        figures=recipe.figures(rows) if rows else {},
    )
