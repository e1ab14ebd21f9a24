"""Augmented batches depend on their place alone: not on ranks, not on where a run resumes, not on global generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.data import Batch, Feed, open_dataset
from pliant.data.plan import mixed_plan, padded_plan, training_plan
from pliant.engine.ranks import Ranks
from pliant.experiment import Batching, Data
from pliant.randomness import philox
from tests.test_data_feed import assert_same, resident_feed, trained

MICRO_BATCHES = 4
AUGMENTS: tuple[dict[str, Any], ...] = (
    {},
    dict(augment="randaugment", augment_ops=3, augment_magnitude=20),
    dict(augment="randaugment", augment_fill=(124, 116, 104)),
    dict(augment="autoaugment"),
    dict(augment="autoaugment", augment_policy="svhn"),
)
ERASINGS: tuple[dict[str, Any], ...] = (
    {},
    *(dict(erasing=0.5, erasing_mode=mode) for mode in ("const", "rand", "pixel")),
)
MIXES: tuple[dict[str, Any], ...] = (
    {},
    dict(mixup=0.2),
    dict(cutmix=1.0),
    dict(mixup=0.8, cutmix=1.0, mix_probability=0.6, switch_probability=0.3),
)
RICH = AUGMENTS[1] | ERASINGS[3] | MIXES[3]


def assert_all_same(one: Batch, other: Batch) -> None:
    assert_same(one, other)
    assert torch.equal(one.targets, other.targets)


@settings(max_examples=60)
@given(
    settings_=st.tuples(st.sampled_from(AUGMENTS), st.sampled_from(ERASINGS), st.sampled_from(MIXES)),
    ranks=st.integers(1, 3),
    first=st.integers(0, 5),
    seed=st.integers(0, 2**63 - 1),
)
def test_ranks_together_get_what_one_gets_wherever_they_begin(settings_, ranks, first, seed):
    feed = resident_feed(seed=seed, **(settings_[0] | settings_[1] | settings_[2]))
    assert feed.steps_per_epoch == 4
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what timm and torchvision draw from must not matter
    torch.manual_seed(seed)
    random.seed(seed)
    whole = trained(feed, list(range(MICRO_BATCHES)), range(7), stage=1)
    states = [random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002
    together = {}
    for rank in range(ranks):
        share = list(Ranks(rank, ranks, torch.device("cpu")).share(MICRO_BATCHES))
        together |= trained(feed, share, range(first, 7), stage=1)
    assert together.keys() == {place for place in whole if place[0] >= first}
    for place, batch in together.items():
        assert_all_same(batch, whole[place])
    now = [random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # noqa: NPY002
    assert states == now


@pytest.fixture(params=["torchvision", "dali"])
def folder_feed(request, image_folder) -> Feed:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return feed_of(image_folder, request.param)


def feed_of(root, loader, **changes) -> Feed:
    data = Data(root=root, loader=loader, size=16, jitter=0.4, lighting=0.1, **(RICH | changes))
    return Feed(open_dataset(data, 7), data, Batching(images=12, micro=3), seed=7, device="cpu")


def test_an_image_folder_s_loader_gives_the_same_on_any_rank(folder_feed):
    whole = trained(folder_feed, [0, 1, 2, 3], range(4))
    for share in ([0, 2], [3, 1]):
        for place, batch in trained(folder_feed, share, range(2, 4)).items():
            assert_all_same(batch, whole[place])


def test_loaders_give_the_same(image_folder):
    """These files are stored without loss, and both loaders resize with torch: not even rounding differs."""
    pytest.importorskip("nvidia.dali")
    one, other = (trained(feed_of(image_folder, loader), [0, 1, 2, 3], range(4)) for loader in ("torchvision", "dali"))
    for place, batch in one.items():
        assert_all_same(batch, other[place])


def test_every_kind_of_augmentation_changes_the_images():
    plain = trained(resident_feed(), [0, 1, 2, 3], range(2))
    for change in (*AUGMENTS[1:], *ERASINGS[1:], *MIXES[1:]):
        served = trained(resident_feed(**change), [0, 1, 2, 3], range(2))
        for place, batch in served.items():
            assert torch.equal(batch.labels, plain[place].labels)
            assert torch.equal(batch.positions, plain[place].positions)
        assert any(not torch.equal(batch.images, plain[place].images) for place, batch in served.items()), change


def test_targets_are_labels_unless_a_run_mixes():
    for batch in trained(resident_feed(**AUGMENTS[1], **ERASINGS[1]), [0, 1], range(2)).values():
        assert batch.targets is batch.labels
    feed = resident_feed(**MIXES[3])
    mixed = 0
    for batch in trained(feed, [0, 1, 2, 3], range(6)).values():
        assert batch.targets.shape == (3, 10)
        assert batch.targets.dtype == batch.images.dtype == torch.float32
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(3))
        own = torch.nn.functional.one_hot(batch.labels, 10).float()
        mixed += not torch.equal(batch.targets, own)
        assert not batch.targets[(own + own.flip(0)) == 0].any()
    assert 6 <= mixed < 24  # not all of them: the form of the targets does not depend on the draw


def test_targets_of_a_feed_in_fp64_are_fp64():
    source = resident_feed(**MIXES[1])
    feed = Feed(source.dataset, source.data, source.batching, seed=7, device="cpu", dtype=torch.float64)
    (batch,) = trained(feed, [0], range(1)).values()
    assert batch.targets.dtype == batch.images.dtype == torch.float64


def test_evaluation_is_neither_augmented_nor_mixed():
    plain, rich = resident_feed(), resident_feed(**RICH)
    for split in ("train", "val"):
        with plain.evaluation(split, batch=8) as want, rich.evaluation(split, batch=8) as got:
            for one, other in zip(want, got, strict=True):
                assert_all_same(one, other)
                assert other.targets is other.labels


@pytest.mark.parametrize("augment", [False, True])
def test_calibration_augments_each_image_and_mixes_none(augment):
    def calibrated(**settings_):
        with resident_feed(**settings_).calibration(images=24, batch=12, augment=augment, seed=3) as batches:
            return dict(batches)

    unmixed, rich, plain = calibrated(**AUGMENTS[1], **ERASINGS[3]), calibrated(**RICH), calibrated()
    for number, batch in rich.items():
        assert_all_same(batch, unmixed[number])
        assert batch.targets is batch.labels
        assert torch.equal(batch.images, plain[number].images) is not augment


def test_switching_one_kind_on_leaves_the_draws_of_the_others_alone():
    def planned(**settings_):
        data = Data(source="cifar10", **settings_)
        return mixed_plan(padded_plan(40, 32, data, draws), data, draws)

    drawn: list[str] = []

    def draws(purpose: str) -> np.random.Generator:
        drawn.append(purpose)
        return philox(5, purpose)

    rich = planned(**RICH)
    assert sorted(drawn) == ["crop", "erasing", "flip", "mixing", "operations"]  # none from the numbers of another
    plain = planned()
    np.testing.assert_array_equal(rich.flip, plain.flip)
    np.testing.assert_array_equal(rich.offset, plain.offset)
    np.testing.assert_array_equal(rich.operations.kind, planned(**AUGMENTS[1]).operations.kind)
    np.testing.assert_array_equal(rich.erasing.box, planned(**ERASINGS[1]).erasing.box)
    assert rich.mixing == planned(**MIXES[3]).mixing
    assert (plain.operations, plain.erasing, plain.mixing) == (None, None, None)


@pytest.mark.parametrize(
    ("source", "asked", "used"),
    [
        ("cifar10", "auto", "cifar10"),
        ("folder", "auto", "imagenet"),
        ("cifar10", "imagenet", "imagenet"),
        ("folder", "svhn", "svhn"),
    ],
)
def test_policy_is_that_of_the_source_unless_another_is_asked_for(source, asked, used):
    def kinds(data: Data) -> np.ndarray:
        sizes = np.full((200, 2), 40, np.int32)
        return training_plan(sizes, data, lambda purpose: philox(1, purpose)).operations.kind

    got = kinds(Data(source=source, augment="autoaugment", augment_policy=asked))
    np.testing.assert_array_equal(got, kinds(Data(augment="autoaugment", augment_policy=used)))
    for other in {"imagenet", "cifar10", "svhn"} - {used}:
        assert not np.array_equal(got, kinds(Data(augment="autoaugment", augment_policy=other)))
