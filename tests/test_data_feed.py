"""Batches depend on their place alone, every image counts once, and no thread is left behind."""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch

from pliant.data import Batch, Dataset, Feed, open_dataset
from pliant.data.index import Pixels
from pliant.data.prefetch import Prefetch, run_in_one_thread
from pliant.errors import UserError
from pliant.experiment import Batching, Data

BATCHING = Batching(images=12, micro=3)


def small_images(images: int, seed: int) -> Pixels:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    return Pixels(pixels, generator.integers(0, 10, images).astype(np.int32), tuple("abcdefghij"))


def resident_feed(images: int = 50, seed: int = 7, **settings) -> Feed:
    dataset = Dataset(small_images(images, 0), None, small_images(23, 1), tuple("abcdefghij"), 10)
    return Feed(dataset, Data(source="cifar10", **settings), BATCHING, seed=seed, device="cpu")


@pytest.fixture(params=["resident", "torchvision", "dali"])
def feed(request, image_folder) -> Feed:
    if request.param == "resident":
        return resident_feed()
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    data = Data(root=image_folder, loader=request.param, size=16, jitter=0.4, lighting=0.1)
    return Feed(open_dataset(data, 7), data, BATCHING, seed=7, device="cpu")


def trained(feed: Feed, micro_batches: list[int], steps: range, stage: int = 0) -> dict[tuple[int, int], Batch]:
    """The batches of a rank by step and micro-batch."""
    places = [(step, micro_batch) for step in steps for micro_batch in micro_batches]
    with feed.training(
        stage=stage, first_step=steps.start, last_step=steps.stop, micro_batches=micro_batches
    ) as batches:
        served = list(batches)
    return dict(zip(places, served, strict=True))


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.images, other.images)


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 1, 0, 2]], [[0], [1], [2], [3]]])
def test_any_sharing_out_and_any_first_step_gives_the_same(feed, shares):
    whole = trained(feed, [0, 1, 2, 3], range(5))
    assert len(whole) == 20
    for share in shares:
        for place, batch in trained(feed, share, range(2, 5)).items():
            assert_same(batch, whole[place])


def test_training_batches_are_ready_for_a_network(feed):
    train = feed.dataset.train
    for batch in trained(feed, [1, 3], range(3)).values():
        side = batch.images.shape[2]
        assert batch.images.shape == (3, 3, side, side)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == batch.positions.dtype == torch.int64
        np.testing.assert_array_equal(batch.labels, train.labels[batch.positions])


def test_an_epoch_sees_every_image_once():
    feed = resident_feed(images=48)
    assert feed.steps_per_epoch == 4
    for epoch in range(2):
        steps = range(4 * epoch, 4 * epoch + 4)
        seen = torch.cat([batch.positions for batch in trained(feed, [0, 1, 2, 3], steps).values()])
        assert sorted(seen.tolist()) == list(range(48))


def test_stages_and_seeds_draw_otherwise():
    places = [0], range(1)
    first = trained(resident_feed(), *places)[0, 0]
    assert not torch.equal(first.positions, trained(resident_feed(), *places, stage=1)[0, 0].positions)
    assert not torch.equal(first.positions, trained(resident_feed(seed=8), *places)[0, 0].positions)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [4, 24, 100])
def test_evaluation_counts_each_image_once(feed, ranks, batch):
    for split in ("train", "val"):
        seen = []
        for rank in range(ranks):
            with feed.evaluation(split, batch=batch, rank=rank, ranks=ranks) as batches:
                for one in batches:
                    seen += one.positions.tolist()
                    np.testing.assert_array_equal(one.labels, feed.dataset.split(split).labels[one.positions])
        assert sorted(seen) == list(range(len(feed.dataset.split(split))))


def test_evaluation_needs_images(feed):
    with pytest.raises(UserError, match="held-out"):
        feed.evaluation("held_out", batch=4)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(
    ("images", "batch", "sizes"),
    [(10, 3, [3, 3, 3]), (11, 3, [3, 3, 3, 2]), (5, 20, [5]), (0, 20, None), (10**6, 20, None)],
)
def test_calibration_is_the_same_on_any_number_of_ranks(feed, augment, images, batch, sizes):
    there = len(feed.dataset.train)
    sizes = sizes or [20] * (there // 20) + [there % 20]
    settings = dict(images=images, batch=batch, augment=augment, seed=3)
    with feed.calibration(**settings) as batches:
        whole = dict(batches)
    assert [len(whole[number].labels) for number in sorted(whole)] == sizes
    assert feed.calibration_batches(images, batch) == len(sizes)
    assert len(torch.cat([one.positions for one in whole.values()]).unique()) == sum(sizes)
    for rank in range(2):
        with feed.calibration(**settings, rank=rank, ranks=2) as batches:
            for number, one in batches:
                assert number % 2 == rank
                assert_same(one, whole[number])


def test_calibration_crops_as_it_is_told():
    feed = resident_feed()
    served = {}
    for augment in (False, True):
        with feed.calibration(images=12, batch=12, augment=augment, seed=3) as batches:
            served[augment] = next(batches)[1]
    assert torch.equal(served[False].positions, served[True].positions)
    assert not torch.equal(served[False].images, served[True].images)


def test_replay_gives_the_first_micro_batch_for_ever():
    first = trained(resident_feed(), [2], range(4, 5))[4, 2]
    feed = resident_feed(replay=True)
    with feed.training(stage=0, first_step=4, last_step=6, micro_batches=[2, 3]) as batches:
        for _ in range(50):
            assert_same(next(batches), first)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pliant")]


def test_leaving_early_ends_the_threads(feed):
    with feed.training(stage=0, first_step=0, last_step=10**9, micro_batches=[0, 1, 2, 3]) as batches:
        next(batches)
        assert prefetch_threads()
    assert not prefetch_threads()
    with suppress(ZeroDivisionError), feed.training(stage=0, first_step=0, last_step=10**9, micro_batches=[0]):
        raise ZeroDivisionError
    assert not prefetch_threads()
    with feed.training(stage=0, first_step=0, last_step=10**9, micro_batches=[0]):
        pass
    assert not prefetch_threads()


def test_a_failure_comes_in_its_turn():
    def produce() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("no third")

    with Prefetch(produce, depth=8) as items:
        time.sleep(0.05)
        assert [next(items), next(items)] == [1, 2]
        with pytest.raises(OSError, match="no third"):
            next(items)
        with pytest.raises(StopIteration):
            next(items)
    assert not prefetch_threads()


def test_no_more_than_the_depth_is_prepared_ahead():
    made = []

    def produce() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with Prefetch(produce, depth=3) as items:
        next(items)
        time.sleep(0.1)
        assert len(made) <= 1 + 3 + 1  # taken, waiting, in the thread's hand


def test_only_the_calling_thread_computes_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found = {}

    def alone() -> None:
        run_in_one_thread()
        found["alone"] = torch.get_num_threads()

    def later() -> None:
        found["later"] = torch.get_num_threads()

    try:
        for work in [alone] * 4 + [later]:
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert found == {"alone": 1, "later": 3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
