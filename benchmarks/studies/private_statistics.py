"""How many numbers batch norm would keep if every width of a US-Net had statistics of its own (US-Nets section 3.2).

    python benchmarks/studies/private_statistics.py

Counted on the networks' layers: a mean and a variance for each channel, at each number of channels that the layer can
have. Layers that compute the same at every width have one set. Beside it what a US-Net keeps, a set for each of its two
bounds, and the weights. Last line JSON.
"""

from __future__ import annotations

import json

import torch
import tyro
from rich.console import Console
from rich.table import Table

from pliant.networks.mobilenet import MobileNet
from pliant.networks.slimmable import SlimmableBatchNorm2d

PAPERS = {"v1": 0.25, "v2": 0.35}
"""Smallest width of each network in the paper."""


def private(least: int, most: int, divisor: int) -> int:
    """Means and variances of a layer that has a set for each number of channels from `least` to `most`."""
    return 2 * sum(range(least, most + 1, divisor))


def count(version: str, low: float, divisor: int) -> dict[str, int | str]:
    """Of one network at full size."""
    with torch.device("meta"):
        net = MobileNet(version=version, divisor=divisor).build(1000, tracked=(1.0, low))  # type: ignore[arg-type]
    norms = [layer for layer in net.modules() if isinstance(layer, SlimmableBatchNorm2d)]
    own = sum(private(min(layer.channels_of_sets), max(layer.channels_of_sets), divisor) for layer in norms)
    kept = sum(buffer.numel() for layer in norms for buffer in layer.buffers())
    weights = sum(parameter.numel() for parameter in net.parameters())
    return {"network": version, "divisor": divisor, "private": own, "us_net": kept, "weights": weights}


def main() -> None:
    found = [count(version, low, divisor) for version, low in PAPERS.items() for divisor in (8, 1)]
    table = Table("MobileNet", "divisor", "a set for each width", "a US-Net's two sets", "weights")
    for one in found:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else value for value in one.values()))
    Console().print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
