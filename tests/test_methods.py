"""The methods on width against their papers' algorithms, written out."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.errors import UserError
from pliant.methods.i_net import INet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet, SlimmableNet
from pliant.networks.slimmable import SlimmableBatchNorm2d
from pliant.randomness import Draw
from pliant.recipe import Batch, Progress, Recipe, Width
from tests.small_recipes import unmixed

TINY = MobileNet(full=0.25, divisor=4)
CLASSES = 5


def build(recipe: Recipe) -> SlimmableNet:
    torch.manual_seed(0)
    return recipe.build(CLASSES).double()


def batch(images: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(7)
    pixels = torch.randn(images, 3, 32, 32, dtype=torch.float64, generator=generator)
    return unmixed(pixels, torch.randint(CLASSES, (images,), generator=generator))


def at(share: float = 0.0) -> Progress:
    return Progress(stage=0, step=round(100 * share), steps=100, epoch=0, run_share=share)


def train(recipe: Recipe, net: SlimmableNet, draw: Draw, progress: Progress) -> dict[str, list[float]]:
    """One iteration, each pass's backward run before the next; losses by pass name."""
    losses: dict[str, list[float]] = {}
    for one in recipe.iteration(net, batch(), draw, progress):
        one.loss.backward()
        losses.setdefault(one.name, []).append(one.loss.item())
    assert sum(map(len, losses.values())) == recipe.passes(progress)
    return losses


def in_order(losses: dict[str, list[float]]) -> list[float]:
    """Of the passes as they ran: those of one name follow each other."""
    return [loss for several in losses.values() for loss in several]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in net.named_parameters()
    }


# US-Net: which widths


@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_sandwich_is_the_largest_then_the_smallest_then_random_ones_in_the_range(n):
    recipe = USNet(network=TINY, low=0.3, high=0.9, n=n)
    net = build(recipe)
    for step in range(20):
        largest, smallest, *random = recipe.widths(net, Draw(0, 0, step, 0))
        assert (largest, smallest, len(random)) == (0.9, 0.3, n - 2)
        assert all(0.3 <= width < 0.9 for width in random)


@pytest.mark.parametrize(
    ("rule", "fixed"), [("sandwich", [1.0, 0.35]), ("max", [1.0]), ("min", [0.35]), ("random", [])]
)
def test_each_rule_runs_its_bounds_and_fills_up_with_random_widths(rule, fixed):
    recipe = USNet(network=TINY, rule=rule, n=3, distill=False)
    widths = recipe.widths(build(recipe), Draw(0, 0, 0, 0))
    assert widths[: len(fixed)] == fixed
    assert len(set(widths)) == len(widths) == recipe.passes(at()) == 3


def test_max_with_one_pass_is_plain_training():
    recipe, plain = USNet(network=TINY, rule="max", n=1, distill=False), INet(network=TINY)
    net, reference = build(recipe), build(plain)
    losses = train(recipe, net, Draw(0, 0, 0, 0), at())
    assert losses == {"1x": [pytest.approx(train(plain, reference, Draw(0, 0, 0, 0), at())["1x"][0])]}
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, gradients(reference)[name], atol=1e-9, rtol=1e-7, msg=name)


@given(
    step=st.integers(0, 10**6),
    one=st.integers(0, 50),
    other=st.integers(51, 99),
    rule=st.sampled_from(("sandwich", "max", "min", "random")),
)
@settings(max_examples=30)
def test_micro_batches_of_a_step_share_their_widths_and_steps_do_not(step, one, other, rule):
    recipe = USNet(network=TINY, rule=rule, n=4, distill=False)
    net = SimpleNamespace(groups=("a", "b"))
    widths = recipe.widths(net, Draw(0, 0, step, one))
    assert recipe.widths(net, Draw(0, 0, step, other)) == widths
    assert recipe.widths(net, Draw(0, 0, step + 1, one)) != widths


def test_nonuniform_widths_are_each_micro_batch_s_own_and_the_bounds_stay_uniform():
    recipe = USNet(network=TINY, nonuniform=True, n=4)
    net = build(recipe)
    drawn = [recipe.widths(net, Draw(0, 0, step, index)) for step in (0, 1) for index in (0, 1)]
    ratios = [ratio for widths in drawn for width in widths[2:] for ratio in width]
    assert all(widths[:2] == [1.0, 0.35] for widths in drawn)
    assert all(len(width) == len(net.groups) for widths in drawn for width in widths[2:])
    assert len(set(ratios)) == len(ratios) == 4 * 2 * len(net.groups)
    assert all(0.35 <= ratio < 1.0 for ratio in ratios)


def test_accumulated_statistics_are_those_of_the_widths_that_were_drawn():
    """Section 3.2: of the grid alone, each width's own, and none is moved by another's pass."""
    recipe = USNet(network=TINY, low=0.5, grid=0.125, n=3, statistics="accumulated")
    net = build(recipe)
    norm = net.features[-2].conv[0][1]
    assert len(norm.channels_of_sets) == len(recipe.points()) == 5
    assert recipe.tracked() == (Width(0.5), Width(1.0)), "validation follows the bounds all the same"
    drawn = set()
    for step in range(4):
        largest, smallest, between = recipe.widths(net, Draw(0, 0, step, 0))
        assert Width(between) in recipe.points()
        drawn |= {largest, smallest, between}
        names = train(recipe, net, Draw(0, 0, step, 0), at())
        assert list(names) == ["1x", "0.5x", "random"], "also where the one between is one of the bounds"
    for point in recipe.points():
        moved = getattr(norm, f"mean_{net.index(point.ratio)}").abs().sum() > 0
        assert moved == (point.ratio in drawn)
        assert not recipe.calibrates(point)
    assert len(drawn) < 5, "or nothing is told apart"
    assert recipe.admits(Width(0.625)) is None
    assert recipe.admits(Width(0.7)) is not None, "there are no statistics for it"
    assert recipe.narrower(net, Width(1.0), 0.1) == []
    with pytest.raises(UserError, match="too many to accumulate statistics for"):
        USNet(network=TINY, nonuniform=True, statistics="accumulated")


@pytest.mark.parametrize(
    ("rule", "points"),
    [("sandwich", (0.35, 1.0)), ("min", (0.35,)), ("max", (1.0,)), ("random", ())],
)
def test_the_bounds_that_every_iteration_runs_keep_statistics(rule, points):
    recipe = USNet(network=TINY, rule=rule, n=3, distill=False)
    assert recipe.tracked() == tuple(map(Width, points))
    net = build(recipe)
    before = copy.deepcopy(dict(net.named_buffers()))
    train(recipe, net, Draw(0, 0, 0, 0), at())
    after = dict(net.named_buffers())
    assert all(not torch.equal(after[name], before[name]) for name in before)
    sets = [len(layer.channels_of_sets) for layer in net.modules() if isinstance(layer, SlimmableBatchNorm2d)]
    assert sets[:2] == [1, 1], "the stem and the first depthwise layer are the same at every width"
    assert set(sets[2:]) == {len(points)}


# US-Net: Algorithm 1


def algorithm_1(recipe: USNet, net: SlimmableNet, draw: Draw, hard: float) -> list[float]:
    """As the paper prints it: one forward and one backward per width, on the network itself."""
    largest, smallest, *random = recipe.widths(net, draw)
    images, labels = batch().images, batch().labels
    full = net(images, largest)
    loss = cross_entropy(full, labels)
    loss.backward()
    losses = [loss.item()]
    teacher = full.detach().softmax(dim=1)
    for width in (smallest, *random):
        logits = net(images, width)
        soft = -(teacher * logits.log_softmax(dim=1)).sum(dim=1).mean()
        loss = hard * cross_entropy(logits, labels) + (1 - hard) * soft
        loss.backward()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("version", "hard", "nonuniform"),
    [("v1", 0.0, False), ("v1", 0.0, True), ("v2", 0.0, False), ("v2", 0.3, True), ("v2", 1.0, False)],
)
def test_iteration_is_algorithm_1(version, hard, nonuniform):
    network = MobileNet(version=version, full=0.25, divisor=4)
    recipe = USNet(network=network, hard=hard, nonuniform=nonuniform)
    net, draw = build(recipe), Draw(0, 0, 3, 1)
    reference = copy.deepcopy(net)
    losses = train(recipe, net, draw, at(0.5))
    expected = algorithm_1(recipe, reference, draw, hard)
    assert list(losses) == ["1x", "0.35x", "random"]
    assert in_order(losses) == pytest.approx(expected, abs=1e-9)
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradient, gradients(reference)[name], atol=1e-9, rtol=1e-7, msg=name)


def test_students_do_not_teach_their_teacher():
    """A distilled pass leaves the channels alone that the full network has beyond the student's."""
    recipe = USNet(network=TINY, n=2)
    net = build(recipe)
    teacher, student = recipe.iteration(net, batch(), Draw(0, 0, 0, 0), at()), net.channels(0.35)
    next(teacher).loss.backward()
    net.zero_grad()
    next(teacher).loss.backward()
    for block in net.features[2:-1]:
        weight = block.conv[0][0].weight  # of the expansion, its inputs in the second place
        seen = (weight.grad != 0).any(dim=(0, 2, 3)).sum().item()
        assert seen in student
        assert seen < weight.shape[1]


@pytest.mark.parametrize(("share", "hard"), [(0.0, 0.8), (0.75, 0.2)])
def test_share_of_labels_stays_or_falls_linearly_to_0(share, hard):
    for decays in (False, True):
        recipe = USNet(network=TINY, hard=0.8, hard_decay=decays, n=3)
        net, draw = build(recipe), Draw(0, 0, 0, 0)
        losses = train(recipe, copy.deepcopy(net), draw, at(share))
        expected = algorithm_1(recipe, net, draw, hard if decays else 0.8)
        assert in_order(losses) == pytest.approx(expected, abs=1e-9)


def test_without_distillation_every_width_learns_from_labels():
    recipe = USNet(network=TINY, distill=False, label_smoothing=0.1)
    net, draw = build(recipe), Draw(0, 0, 0, 0)
    losses = train(recipe, net, draw, at())
    for width, loss in zip(recipe.widths(net, draw), in_order(losses), strict=True):
        expected = cross_entropy(net(batch().images, width), batch().labels, label_smoothing=0.1)
        assert loss == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(rule="random"), "write --recipe.no-distill"),
        (dict(distill=False, hard=0.5), "leave --recipe.hard out"),
        (dict(hard_decay=True), "leave --recipe.hard-decay out"),
        (dict(rule="min"), "write --recipe.no-distill"),
        (dict(n=1), "--recipe.n of 2 or more, not 1"),
        (dict(rule="max", n=0), "--recipe.n of 1 or more, not 0"),
        (dict(low=0.8, high=0.5), "got 0.8 and 0.5"),
        (dict(low=0.0), "got 0 and 1"),
        (dict(high=1.5), "got 0.35 and 1.5"),
        (dict(hard=1.1), "not 1.1"),
        (dict(hard=-0.1), "not -0.1"),
        (dict(grid=0.0), "a --recipe.grid above 0"),
        (
            dict(network=MobileNet(divisor=32)),
            "--recipe.network: A width divisor of 32 leaves no channel in a layer of 16",
        ),
        (dict(network=MobileNet(version="v1", divisor=64)), "write a divisor of at most 32."),
        (dict(network=MobileNet(divisor=0)), "at least 1, not 0"),
        (dict(network=MobileNet(full=1.4)), "full lies above 0 and is at most 1, not 1.4"),
        (dict(network=MobileNet(full=0.0)), "full lies above 0 and is at most 1, not 0"),
        (dict(network=MobileNet(dropout=1.5)), "dropout lies in [0, 1), not 1.5"),
        (dict(network=MobileNet(late_stride=0)), "Strides are 1 or 2, not 0"),
        (dict(label_smoothing=1.0), "--recipe.label-smoothing so, not 1"),
    ],
    ids=str,
)
def test_contradictory_us_net_is_refused_before_a_weight_is_made(settings, said):
    with pytest.raises(UserError) as caught:
        USNet(**settings)
    assert said in str(caught.value)
