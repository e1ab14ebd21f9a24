"""Feeding for long takes no more memory than feeding for a while."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pliant.data import Dataset, Feed
from pliant.data.index import scan
from pliant.experiment import Batching, Data

IMAGES, MICRO = 20_000, 10


def megabytes() -> float:
    """Memory of this process that lies in RAM; loaders start threads, no processes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


@pytest.mark.soak
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_an_epoch_of_photographs_does_not_grow(loader, shared_data):
    if loader == "dali" and find_spec("nvidia") is None:
        pytest.skip("DALI is not installed")
    photos = scan(shared_data / "photos", None)
    train = photos.subset(np.arange(IMAGES) % len(photos))
    data = Data(root=shared_data / "photos", loader=loader)
    dataset = Dataset(train, None, None, train.classes, len(train.classes))
    feed = Feed(dataset, data, Batching(images=MICRO, micro=MICRO), seed=0, device="cpu")
    steps = IMAGES // MICRO
    grown = []
    with feed.training(stage=0, first_step=0, last_step=steps, micro_batches=[0]) as batches:
        for step, _ in enumerate(batches, 1):
            if step == steps // 2:
                before = megabytes()
            elif step > steps // 2 and step % 50 == 0:
                grown.append(megabytes() - before)
    print(f"{loader}: from step {steps // 2} to {steps} grown by {max(grown):.0f} MB at most")
    assert len(grown) == steps // 2 // 50
    assert max(grown) < 100
