"""The order of the training images is a permutation each epoch and a pure function of its key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.data.order import Order, steps_per_epoch
from pliant.experiment import Batching

seeds = st.integers(0, 2**63 - 1)
tails = st.sampled_from(("drop", "wrap"))


def epoch_of_samples(order: Order, stage: int, epoch: int, batching: Batching) -> np.ndarray:
    steps = steps_per_epoch(order.images, batching.images, order.tail)
    return np.concatenate(
        [
            order.samples(stage, epoch * steps + step, micro_batch, batching)
            for step in range(steps)
            for micro_batch in range(batching.micro_batches)
        ]
    )


@given(
    images=st.integers(1, 300),
    micro=st.integers(2, 20),
    micro_batches=st.integers(1, 4),
    tail=tails,
    seed=seeds,
    epoch=st.integers(0, 5),
)
def test_no_image_comes_twice_before_each_has_come_once(images, micro, micro_batches, tail, seed, epoch):
    batching = Batching(images=micro * micro_batches, micro=micro)
    if images < batching.images and tail == "drop":
        return
    samples = epoch_of_samples(Order(images, seed, tail), 0, epoch, batching)
    assert len(np.unique(samples[:images])) == min(images, len(samples))
    if tail == "wrap":
        assert len(np.unique(samples)) == images
        assert len(samples) - images < batching.images


@given(
    seed=seeds,
    stage=st.integers(0, 3),
    step=st.integers(0, 10_000),
    micro_batch=st.integers(0, 3),
    tail=tails,
    before=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10_000), st.integers(0, 3)), max_size=4),
)
def test_samples_depend_on_nothing_but_their_place(seed, stage, step, micro_batch, tail, before):
    batching = Batching(images=32, micro=8)
    used = Order(101, seed, tail)
    for place in before:
        used.samples(*place, batching)
    fresh = Order(101, seed, tail)
    np.testing.assert_array_equal(
        used.samples(stage, step, micro_batch, batching), fresh.samples(stage, step, micro_batch, batching)
    )


def test_epochs_stages_and_seeds_differ():
    batching = Batching(images=64, micro=64)
    first = Order(64, 1, "drop").samples(0, 0, 0, batching)
    assert not np.array_equal(first, Order(64, 1, "drop").samples(0, 1, 0, batching))
    assert not np.array_equal(first, Order(64, 1, "drop").samples(1, 0, 0, batching))
    assert not np.array_equal(first, Order(64, 2, "drop").samples(0, 0, 0, batching))


def test_dropped_images_differ_from_epoch_to_epoch():
    batching = Batching(images=32, micro=32)
    order = Order(33, 0, "drop")
    left_out = {33 * 32 // 2 - int(epoch_of_samples(order, 0, epoch, batching).sum()) for epoch in range(20)}
    assert len(left_out) > 5


@pytest.mark.parametrize(("tail", "steps"), [("drop", 3), ("wrap", 4)])
def test_epoch_of_a_step(tail, steps):
    batching = Batching(images=30, micro=10)
    order = Order(100, 0, tail)
    assert steps_per_epoch(100, 30, tail) == steps
    assert [order.epoch_of(step, batching) for step in (0, steps - 1, steps, 5 * steps)] == [0, 0, 1, 5]


def test_wrap_goes_on_with_the_first_images_of_the_epoch():
    samples = epoch_of_samples(Order(10, 3, "wrap"), 0, 2, Batching(images=4, micro=2))
    np.testing.assert_array_equal(samples[10:], samples[:2])
