"""A draw is a pure function of where it is asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.randomness import Draw, philox

words = st.integers(0, 2**64 - 1)
counters = st.lists(words, max_size=3).map(tuple)
purposes = st.text(max_size=20)
places = st.builds(
    Draw,
    seed=st.integers(0, 2**63 - 1),
    stage=st.integers(0, 9),
    step=st.integers(0, 10**6),
    micro_batch=st.integers(0, 99),
)


def numbers(generator: np.random.Generator, count: int = 4) -> list[int]:
    return generator.integers(2**64, size=count, dtype=np.uint64).tolist()


@given(seed=words, purpose=purposes, counters=counters, others=st.lists(counters, max_size=3))
def test_draw_depends_on_its_key_alone_whatever_was_drawn_before(seed, purpose, counters, others):
    first = numbers(philox(seed, purpose, *counters))
    for other in others:
        numbers(philox(seed, purpose, *other))
    torch.manual_seed(0)
    assert numbers(philox(seed, purpose, *counters)) == first


@given(key=st.tuples(words, purposes, words, words, words), other=st.tuples(words, purposes, words, words, words))
def test_another_key_gives_other_numbers(key, other):
    same = numbers(philox(key[0], key[1], *key[2:])) == numbers(philox(other[0], other[1], *other[2:]))
    assert same == (key == other)


def test_each_part_of_the_key_matters():
    keys = [(0, "p", 0, 0, 0), (1, "p", 0, 0, 0), (0, "q", 0, 0, 0)]
    keys += [(0, "p", 1, 0, 0), (0, "p", 0, 1, 0), (0, "p", 0, 0, 1), (0, "p", 0, 0, 2**63)]
    drawn = [tuple(numbers(philox(seed, purpose, *counters))) for seed, purpose, *counters in keys]
    assert len(set(drawn)) == len(keys)


def test_neighbouring_places_share_no_numbers():
    """Their counters are 2**64 blocks apart: a long draw at one place does not run into the next place's."""
    drawn = [set(philox(3, "p", 0, step, index).bit_generator.random_raw(4096)) for step in (0, 1) for index in (0, 1)]
    assert len(set.union(*drawn)) == sum(map(len, drawn))


def test_draws_are_those_of_earlier_releases():
    """A run is resumed by drawing again what it drew: these numbers never change."""
    draw = Draw(seed=7, stage=1, step=20, micro_batch=3)
    assert draw.uniform(0.25, 1.0, 2) == (0.5058966784581026, 0.40176475792020033)
    assert draw.permutation(6) == (5, 3, 4, 1, 2, 0)
    assert draw.torch_seed("dropout") == 3649220349369286329


def test_a_fourth_counter_is_refused():
    with pytest.raises(ValueError, match="three counters"):
        philox(0, "p", 1, 2, 3, 4)


@given(place=places, other=st.integers(100, 199), low=st.floats(0.05, 0.5), number=st.integers(1, 8))
def test_uniform_is_the_same_in_all_micro_batches_of_a_step(place, other, low, number):
    drawn = place.uniform(low, 1.0, number)
    assert len(drawn) == number
    assert all(low <= value < 1.0 for value in drawn)
    assert Draw(place.seed, place.stage, place.step, other).uniform(low, 1.0, number) == drawn
    assert Draw(place.seed, place.stage, place.step + 1, place.micro_batch).uniform(low, 1.0, number) != drawn
    assert Draw(place.seed, place.stage + 1, place.step, place.micro_batch).uniform(low, 1.0, number) != drawn
    assert Draw(place.seed + 1, place.stage, place.step, place.micro_batch).uniform(low, 1.0, number) != drawn


@given(place=places, other=st.integers(100, 199))
def test_own_draws_differ_between_micro_batches_and_from_the_shared_ones(place, other):
    elsewhere = Draw(place.seed, place.stage, place.step, other)
    streams = [place.own("p"), elsewhere.own("p"), place.shared("p"), place.own("q")]
    assert len({tuple(numbers(stream)) for stream in streams}) == len(streams)
    assert numbers(place.shared("p")) == numbers(elsewhere.shared("p"))


@given(place=places, number=st.integers(0, 60), other=st.integers(100, 199))
def test_permutation_is_one_and_the_step_s(place, number, other):
    drawn = place.permutation(number)
    assert sorted(drawn) == list(range(number))
    assert Draw(place.seed, place.stage, place.step, other).permutation(number) == drawn


def test_permutations_are_equally_likely():
    """24 orders of 4 things over 4,800 steps: each 200 times, give or take 5 standard deviations."""
    drawn = [Draw(0, 0, step, 0).permutation(4) for step in range(4800)]
    counts = np.unique(drawn, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(counts - 200).max() < 5 * np.sqrt(200)


def test_widths_of_successive_steps_are_uniform_and_unrelated():
    drawn = np.array([Draw(5, 0, step, 0).uniform(0.25, 1.0, 1)[0] for step in range(4000)])
    shares = (np.sort(drawn) - 0.25) / 0.75
    assert abs(shares - np.arange(4000) / 4000).max() < 1.95 / np.sqrt(4000)  # Kolmogorov and Smirnov, p = 0.001
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4 / np.sqrt(4000)


def test_bulk_tensors_do_not_depend_on_torch_s_own_generator():
    draw = Draw(0, 0, 5, 2)
    torch.manual_seed(1)
    first = torch.rand(10, generator=draw.generator())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(torch.rand(10, generator=draw.generator()), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(torch.rand(10, generator=Draw(0, 0, 5, 3).generator()), first)
    assert not torch.equal(torch.rand(10, generator=draw.generator(purpose="other")), first)
