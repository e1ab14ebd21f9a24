"""Points are written and read back, and a network says which it can be asked for."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.asks import parse_points
from pliant.errors import UserError
from pliant.methods.i_net import INet
from pliant.methods.s_net import SNet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from pliant.recipe import Native, Width, Widths, parse_point
from tests.small_recipes import Plain

ratios = st.floats(0, 1, exclude_min=True)
V1_GROUPS = 14  # the stem and 13 blocks


@given(ratio=ratios)
def test_width_is_read_back_as_it_was_written(ratio):
    assert parse_point(str(Width(ratio))) == Width(ratio)


@given(several=st.lists(ratios, min_size=2, max_size=30))
def test_widths_are_read_back_as_they_were_written(several):
    assert parse_point(str(Widths(tuple(several)))) == Widths(tuple(several))


def test_native_is_read_back():
    assert parse_point(str(Native())) == Native()


@given(one=ratios, other=ratios)
def test_unlike_widths_are_written_unlike(one, other):
    """Statistics are kept in files that the text names: two widths must never share one."""
    assert (str(Width(one)) == str(Width(other))) == (one == other)


@given(ratio=ratios, several=st.lists(ratios, min_size=2, max_size=30), other=st.lists(ratios, min_size=2, max_size=30))
def test_file_names_are_short_and_unlike(ratio, several, other):
    points = [Width(ratio), Widths(tuple(several)), Widths(tuple(other)), Native()]
    names = [point.file_name for point in points]
    assert all(len(name) <= 100 and "/" not in name for name in names)
    assert len(set(names)) == len(set(points))


@pytest.mark.parametrize(("point", "text"), [(Width(0.35), "0.35x"), (Width(1.0), "1x"), (Widths((1, 0.5)), "1/0.5x")])
def test_text_is_short_where_it_can_be(point, text):
    assert str(point) == text
    assert parse_point(f" {text.removesuffix('x')} ") == point


@pytest.mark.parametrize("text", ["", "x", "half", "0.5y", "0.5xx", "0.5/", "/", "0.5,0.6", "native/0.5", "0.5 0.6"])
def test_text_that_is_no_point_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"is not a point: write a width such as 0\.35"):
        parse_point(text)


@pytest.mark.parametrize("text", ["0", "-0.5", "1.01", "nan", "inf", "0.5/0", "0.5/nan", "1/1.5"])
def test_number_that_is_no_width_is_refused(text):
    with pytest.raises(UserError, match="A width lies above 0 and is at most 1"):
        parse_point(text)


@given(first=st.integers(1, 100), count=st.integers(0, 20), step=st.integers(1, 10))
def test_range_has_both_ends_and_even_steps(first, count, step):
    last = first + count * step
    if last > 100:
        return
    points = parse_points([f"{first / 100}:{step / 100}:{last / 100}"])
    assert points == [Width(number / 100) for number in range(first, last + 1, step)]


def test_ranges_and_single_points_follow_each_other():
    points = parse_points(["1/0.5", "0.25:0.25:0.75", "native"])
    assert points == [Widths((1.0, 0.5)), Width(0.25), Width(0.5), Width(0.75), Native()]


@pytest.mark.parametrize(
    "text",
    ["0.35:0.05", "1:0.1:0.5", "0.5:0:0.6", "a:b:c", ":::", "0.1:0.4:1", "nan:nan:nan", "inf:0.1:1", "0.1:1e-320:1"],
)
def test_text_that_is_no_range_is_refused_with_an_example(text):
    with pytest.raises(UserError, match="is no range of widths: write low:step:high"):
        parse_points([text])


def test_us_net_is_asked_for_any_width_in_its_range():
    recipe = USNet(network=MobileNet(version="v1"), low=0.25, high=0.75)
    for ratio in (0.25, 0.25 - 1e-12, 0.3333, 0.75):
        assert recipe.admits(Width(ratio)) is None
    assert recipe.admits(Widths((0.25, 0.75) * (V1_GROUPS // 2))) is None
    assert "outside the trained range: write a width from 0.25 to 0.75" in recipe.admits(Width(0.2))
    assert "Width 0.8 lies outside" in recipe.admits(Widths((0.5,) * (V1_GROUPS - 1) + (0.8,)))
    assert "14 groups of layers, not 3" in recipe.admits(Widths((0.5, 0.5, 0.5)))
    assert "native is not a width" in recipe.admits(Native())


def test_s_net_is_asked_for_its_switches_and_with_shared_scales_for_widths_between():
    shared, private = SNet(widths=(1.0, 0.5)), SNet(widths=(1.0, 0.5), private=True)
    for recipe in (shared, private):
        assert recipe.points() == (Width(1.0), Width(0.5))
        assert recipe.admits(Width(0.5)) is None
        assert recipe.admits(Width(0.3)) is not None
    assert shared.admits(Width(0.7)) is None
    assert private.admits(Width(0.7)) == "0.7x is none of this recipe's points: write one of 1x, 0.5x."


def test_i_net_and_a_network_of_one_shape_are_asked_for_their_own_point():
    assert INet(width=0.5).admits(Width(0.5)) is None
    assert "write one of 0.5x" in INet(width=0.5).admits(Width(0.4))
    assert Plain().admits(Native()) is None
    assert "write one of native" in Plain().admits(Width(1.0))


@given(low=st.integers(1, 100), high=st.integers(1, 100), step=st.integers(1, 120))
def test_spectrum_of_a_us_net_begins_and_ends_at_its_bounds(low, high, step):
    if low > high:
        return
    recipe = USNet(low=low / 100, high=high / 100, grid=step / 100)
    points = recipe.points()
    assert points[0] == Width(low / 100)
    assert points[-1] == Width(high / 100)
    apart = [other.ratio - one.ratio for one, other in itertools.pairwise(points)]
    assert apart[:-1] == pytest.approx([step / 100] * (len(points) - 2), abs=2e-6) if apart else low == high
    assert all(gap <= step / 100 + 2e-6 for gap in apart)
    assert list(points) == sorted(set(points))
    assert all(recipe.admits(point) is None for point in points)
