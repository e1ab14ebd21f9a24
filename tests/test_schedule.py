"""Steps, stages and epochs are arithmetic."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pliant.engine.schedule import Schedule, make_schedule
from pliant.errors import UserError
from pliant.experiment import Optimization
from pliant.recipe import Stage


def stages_of(parts: list[int]) -> tuple[Stage, ...]:
    return tuple(Stage(name=f"stage{number}", share=part / sum(parts)) for number, part in enumerate(parts))


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    parts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    steps = draw(st.integers(1, 300))
    per_epoch = draw(st.integers(1, 40))
    assume(steps >= 2 * sum(parts))
    return make_schedule(stages_of(parts), Optimization(steps=steps), [per_epoch] * len(parts))


@given(parts=st.lists(st.integers(1, 9), min_size=1, max_size=5), total=st.integers(100, 5000))
def test_stages_share_out_the_steps(parts, total):
    schedule = make_schedule(stages_of(parts), Optimization(steps=total), [7] * len(parts))
    assert schedule.total == sum(schedule.steps) == total
    for part, steps in zip(parts, schedule.steps, strict=True):
        assert abs(steps - total * part / sum(parts)) <= 1


def test_length_is_in_epochs_unless_steps_are_given():
    assert make_schedule((Stage(),), Optimization(epochs=2.5), [10]).total == 25
    assert make_schedule((Stage(),), Optimization(epochs=2.5, steps=7), [10]).total == 7


def test_a_stage_of_larger_steps_has_fewer_of_them_in_as_many_epochs():
    stages = (Stage(share=0.5, batch=4), Stage(share=0.5))
    schedule = make_schedule(stages, Optimization(epochs=6.0, warmup_epochs=1.0), [5, 20])
    assert schedule.steps == (15, 60)
    assert [schedule.progress(0, step).epoch for step in (0, 4, 5, 14)] == [0, 0, 1, 2]
    assert [schedule.progress(1, step).epoch for step in (19, 20)] == [0, 1]
    assert [step for step in range(1, 76) if schedule.due(step, 1.0)] == [5, 10, 15, 35, 55, 75]
    assert [schedule.lr(stage, step) / 0.5 for stage, step in ((0, 4), (1, 19))] == [1.0, 1.0], "the warm-ups' ends"
    assert schedule.lr(1, 18) < 0.5


@pytest.mark.parametrize("epochs", [0.1, 0.3, 1 / 3, 0.7])
def test_what_is_due_each_part_of_an_epoch_is_due_as_often_as_is_written(epochs):
    schedule = make_schedule((Stage(),), Optimization(steps=210), [210])
    due = [step for step in range(1, 211) if schedule.due(step, epochs)]
    assert due[: int(1 / epochs)] == [
        math.ceil(round(210 * epochs * part, 6)) for part in range(1, int(1 / epochs) + 1)
    ]


@given(schedule=schedules())
def test_each_step_lies_in_one_stage(schedule):
    places = [schedule.locate(step) for step in range(schedule.total)]
    assert places == [(stage, step) for stage, count in enumerate(schedule.steps) for step in range(count)]
    last = len(schedule.steps) - 1
    assert schedule.locate(schedule.total) == (last, schedule.steps[last])
    assert [schedule.before(stage) for stage in range(last + 1)] == [0, *accumulate(schedule.steps)][:-1]


@given(schedule=schedules())
def test_progress_runs_from_0_towards_1(schedule):
    shares = []
    for stage, count in enumerate(schedule.steps):
        for step in range(count):
            progress = schedule.progress(stage, step)
            assert (progress.stage, progress.step, progress.steps) == (stage, step, count)
            assert progress.epoch == step // schedule.steps_per_epoch[stage]
            assert progress.stage_share == step / count
            shares.append(progress.run_share)
    assert shares == [step / schedule.total for step in range(schedule.total)]


@given(steps=st.integers(1, 200), per_epoch=st.integers(1, 30), quarters=st.integers(1, 12))
def test_what_is_due_every_so_many_epochs_is_due_once_each_interval_and_at_the_end(steps, per_epoch, quarters):
    schedule = make_schedule((Stage(),), Optimization(steps=steps), [per_epoch])
    interval = per_epoch * quarters  # in quarters of a step
    due, crossed = [], 0
    for step in range(1, steps + 1):
        if 4 * step // interval > crossed or step == steps:
            due.append(step)
        crossed = 4 * step // interval
    assert [step for step in range(1, steps + 1) if schedule.due(step, quarters / 4)] == due


def test_with_0_epochs_it_is_due_at_the_end_alone():
    schedule = make_schedule((Stage(),), Optimization(steps=9), [3])
    assert [step for step in range(1, 10) if schedule.due(step, 0)] == [9]


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_learning_rate_climbs_and_falls_anew_in_each_stage_times_its_factor(shape):
    stages = (Stage(share=0.5), Stage(share=0.5, learning_rate=0.1))
    schedule = make_schedule(stages, Optimization(lr=2.0, steps=40, warmup_epochs=0.5, schedule=shape), [10, 10])
    first = [schedule.lr(0, step) for step in range(20)]
    assert max(first) == first[4] == first[5] == 2.0
    assert first[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert first[5:] == sorted(first[5:], reverse=True)
    assert (first[-1] == 2.0) if shape == "constant" else (0 < first[-1] < 0.2)
    assert [schedule.lr(1, step) for step in range(20)] == pytest.approx([0.1 * rate for rate in first])


def test_rate_ends_at_the_floor_and_nothing_lies_below_it():
    for shape in ("linear", "cosine"):
        schedule = make_schedule((Stage(),), Optimization(lr=2.0, floor=0.1, steps=1000, schedule=shape), [10])
        rates = [schedule.lr(0, step) for step in range(1000)]
        assert rates[0] == 2.0
        assert rates[500] == pytest.approx(1.1), "halfway between peak and floor"
        assert 0.2 < rates[-1] == min(rates) < 0.202


def test_rate_in_steps_is_a_tenth_from_one_half_and_a_hundredth_from_three_quarters():
    schedule = make_schedule((Stage(),), Optimization(lr=2.0, steps=40, schedule="steps"), [10])
    rates = [schedule.lr(0, step) for step in range(40)]
    assert rates == pytest.approx([2.0] * 20 + [0.2] * 10 + [0.02] * 10)


def test_stage_without_a_step_is_refused():
    with pytest.raises(UserError, match=r"Stage stage1 has no step in a run of 5: write more --optimization\.epochs"):
        make_schedule(stages_of([99, 1]), Optimization(steps=5), [10, 10])


@pytest.mark.parametrize("warmup", [1.0, 5.0])
def test_warm_up_that_fills_a_stage_is_refused(warmup):
    with pytest.raises(UserError, match="fills all 10 steps of stage train: write a shorter"):
        make_schedule((Stage(),), Optimization(epochs=1, warmup_epochs=warmup), [10])
