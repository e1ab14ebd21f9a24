"""Post-statistics of batch norm against the values that the layers really saw."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from pliant.engine.batchnorm import LayerStatistics, RunningStatistics, calibrate, impose, norm_layers, twin
from pliant.engine.precision import Precision
from pliant.methods.s_net import SNet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from pliant.recipe import Native, Point, Recipe, Width, Widths
from tests.small_recipes import Plain
from tests.test_step import ALONE

DROPPING = MobileNet(full=0.25, divisor=4, dropout=0.5)
RECIPE = USNet(network=DROPPING)
UNEVEN = Widths(tuple(0.35 + 0.02 * place for place in range(DROPPING.number_of_groups)))
POINTS = (Width(1.0), Width(0.35), Width(0.6), UNEVEN)
SIZES = (9, 4, 7)  # images of each batch


def build(recipe: Recipe = RECIPE) -> nn.Module:
    """With scales and shifts away from 1 and 0, which would leave many layers' inputs without a mean."""
    torch.manual_seed(0)
    net = recipe.build(5)
    for layer in norm_layers(net).values():
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return net


def batches(sizes: tuple[int, ...] = SIZES) -> Iterator[tuple[int, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for index, size in enumerate(sizes):
        yield index, 2.0 + (index + 1) * torch.randn(size, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_running_statistics_do_not_move_in_a_step_that_is_left_out(micro_batches: int) -> None:
    """An overflow would stay in them for good."""
    layer = nn.BatchNorm2d(3)
    running = RunningStatistics(layer)
    moves = []
    for number in (0.0, 1.0, 0.0):
        before = layer.running_mean.clone()
        running.begin(micro_batches)
        for _ in range(micro_batches):
            layer(torch.full((4, 3, 2, 2), torch.inf if number else 1.0))
            running.end_micro_batch()
        running.end()
        running.settle(torch.tensor(number))
        moves.append(layer.running_mean - before)
    assert torch.equal(moves[1], torch.zeros(3))
    assert (moves[0] > 0).all()
    assert (moves[2] > 0).all()
    assert torch.isfinite(layer.running_var).all()


def measure(
    points: tuple[Point, ...], average: str = "pooled", net: nn.Module | None = None, recipe: Recipe = RECIPE
) -> dict[Point, dict[str, LayerStatistics]]:
    return calibrate(
        recipe,
        build(recipe) if net is None else net,
        points,
        batches(),
        average=average,
        number=len(SIZES),
        precision=Precision("fp32", ALONE.device),
        ranks=ALONE,
    )


def seen(point: Point, recipe: Recipe = RECIPE) -> dict[str, list[Tensor]]:
    """What each batch norm is given, batch by batch, (C, values) in float64, as it normalises with the batch's own."""
    net = build(recipe).eval()
    values: dict[str, list[Tensor]] = {}
    for name, layer in norm_layers(net).items():
        layer.train().register_forward_pre_hook(
            lambda _, args, name=name: values.setdefault(name, []).append(args[0].transpose(0, 1).flatten(1).double())
        )
    with torch.no_grad():
        for _, images in batches():
            recipe.predict(net, images, point)
    return values


def pooled(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    every = torch.cat(parts, dim=1)
    return every.mean(1), every.var(1, correction=0)


def cumulative(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eq. 8 as printed."""
    return (
        torch.stack([part.mean(1) for part in parts]).mean(0),
        torch.stack([part.var(1) for part in parts]).mean(0),
    )


def moving(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eq. 5 with m = 0.9."""
    mean, var = parts[0].mean(1), parts[0].var(1)
    for part in parts[1:]:
        mean = 0.9 * mean + 0.1 * part.mean(1)
        var = 0.9 * var + 0.1 * part.var(1)
    return mean, var


@pytest.mark.parametrize("point", POINTS, ids=lambda point: str(point)[:6])
@pytest.mark.parametrize("average", [pooled, cumulative, moving], ids=lambda average: average.__name__)
def test_statistics_are_those_of_the_values_that_a_layer_saw(average, point):
    measured, values = measure((point,), average.__name__)[point], seen(point)
    assert list(measured) == list(values)
    for name, parts in values.items():
        mean, var = average(parts)
        torch.testing.assert_close(measured[name].mean.double(), mean, atol=1e-5, rtol=1e-5, msg=f"{name} mean")
        torch.testing.assert_close(measured[name].var.double(), var, atol=1e-5, rtol=1e-5, msg=f"{name} var")


def test_the_averages_differ_where_batches_do():
    (one, two, three) = (measure((POINTS[0],), average)[POINTS[0]] for average in ("pooled", "cumulative", "moving"))
    assert all(not torch.allclose(one[name].var, two[name].var, rtol=1e-3) for name in one)
    assert all(not torch.allclose(two[name].var, three[name].var, rtol=1e-3) for name in one)


@pytest.mark.parametrize("average", ["pooled", "cumulative", "moving"])
def test_every_layer_leaves_its_initial_statistics(average):
    """The released code of US-Nets leaves them all at mean 0 and variance 1."""
    for layers in measure(POINTS, average).values():
        for layer in layers.values():
            assert (layer.mean != 0).all()
            assert (layer.var != 1).all()


def test_layers_without_a_width_are_calibrated_too():
    recipe = Plain(dropout=0.5)
    (layer,) = measure((Native(),), recipe=recipe)[Native()].values()
    (parts,) = seen(Native(), recipe).values()
    torch.testing.assert_close(torch.stack([layer.mean, layer.var]).double(), torch.stack(pooled(parts)))


def test_calibrating_again_gives_the_same():
    """So dropout is off: with it on, the layers after it would see other values each time."""
    net = build().train()
    first, second = measure(POINTS, net=net), measure(POINTS, net=net)
    assert same(first, second)


def same(one: dict[Point, dict[str, LayerStatistics]], other: dict[Point, dict[str, LayerStatistics]]) -> bool:
    return all(
        torch.equal(layer.mean, other[point][name].mean) and torch.equal(layer.var, other[point][name].var)
        for point, layers in one.items()
        for name, layer in layers.items()
    )


class DropsFirst(nn.Module):
    """Dropout before a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 32 * 32, 5))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def test_dropout_is_off():
    (layer,) = measure((Native(),), net=DropsFirst().train(), recipe=Plain())[Native()].values()
    images = torch.cat([images for _, images in batches()])
    torch.testing.assert_close(layer.mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(layer.var, images.var((0, 2, 3), correction=0))


def test_network_stays_as_it_was():
    net = build().train()
    before = copy.deepcopy(net.state_dict())
    measure(POINTS, net=net)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert all(module.training for module in net.modules())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())


def test_statistics_carry_no_graph():
    for layer in measure(POINTS)[POINTS[0]].values():
        assert not layer.mean.requires_grad
        assert not layer.var.requires_grad


def test_points_together_are_each_alone_and_every_batch_is_read_once():
    net, read = build(), []

    def counted() -> Iterator[tuple[int, Tensor]]:
        for index, images in batches():
            read.append(index)
            yield index, images

    options = dict(average="pooled", number=len(SIZES), precision=Precision("fp32", ALONE.device), ranks=ALONE)
    together = calibrate(RECIPE, net, POINTS, counted(), **options)
    assert read == [0, 1, 2]
    assert list(together) == list(POINTS)
    for point in POINTS:
        assert same(measure((point,), net=net), together)


def test_untracked_width_is_refused_until_it_is_calibrated():
    net, images = build().eval(), next(batches())[1]
    RECIPE.predict(net, images, Width(0.35))
    for point in (Width(0.6), UNEVEN):
        with pytest.raises(ValueError, match="calibrate it first"):
            RECIPE.predict(net, images, point)
        calibrated = impose(net, measure((point,), net=net)[point])
        assert RECIPE.predict(calibrated, images, point).logits.isfinite().all()


def test_imposed_statistics_are_what_a_layer_normalises_with():
    net, images = build().eval(), next(batches())[1]
    statistics = measure((Width(0.6),), net=net)[Width(0.6)]
    one = impose(net, statistics)
    layers, checked = norm_layers(one), []

    def check(name: str) -> object:
        def hook(layer: nn.Module, args: tuple[Tensor, int | None], output: Tensor) -> None:
            own, x = statistics[name], args[0]
            scale = layer.weight[: x.shape[1]] / (own.var + layer.eps).sqrt()
            shift = layer.bias[: x.shape[1]] - own.mean * scale
            torch.testing.assert_close(output, x * scale[:, None, None] + shift[:, None, None], atol=1e-4, rtol=1e-4)
            checked.append(name)

        return hook

    for name, layer in layers.items():
        layer.register_forward_hook(check(name))
    RECIPE.predict(one, images, Width(0.6))
    assert set(checked) == set(statistics)


def test_twin_shares_the_weights_and_has_buffers_of_its_own():
    net = build(SNet(network=DROPPING)).train()
    one = twin(net)
    assert all(a is b for a, b in zip(one.parameters(), net.parameters(), strict=True))
    assert all(a is not b and torch.equal(a, b) for a, b in zip(one.buffers(), net.buffers(), strict=True))
    assert not any(module.training for module in one.modules())
    assert net.training
