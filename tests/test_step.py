"""The step against a bare loop, on recipes that are no slimmable networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pliant.engine.backends import wrap
from pliant.engine.batchnorm import RunningStatistics
from pliant.engine.optimization import learning_rate, make_optimizer, set_learning, update
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.engine.step import accumulate
from pliant.errors import UserError
from pliant.experiment import Optimization
from pliant.randomness import Draw
from pliant.recipe import Batch, Pass, Progress, Recipe, Stage
from tests.small_recipes import ALL, PerSample, Plain, TwoStages, Unequal, unmixed

ALONE = Ranks(0, 1, torch.device("cpu"))


def micro_batch(index: int, images: int = 8, classes: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    return unmixed(pixels, torch.randint(classes, (images,), generator=generator))


def progress_at(step: int) -> Progress:
    return Progress(stage=0, step=step, steps=100, epoch=0, run_share=0.0)


def run_step(recipe: Recipe, net: nn.Module, step: int, count: int, precision: str = "fp32") -> list[Tensor]:
    draws = [Draw(0, 0, step, index) for index in range(count)]
    losses = accumulate(
        recipe,
        net,
        wrap(net, ALONE, "single", Optimization(), Precision(precision, ALONE.device)),
        RunningStatistics(net),
        [micro_batch(index) for index in range(count)],
        draws,
        progress_at(step),
        count,
    )
    return losses.values


def bare_loop(recipe: Recipe, net: nn.Module, step: int, count: int) -> None:
    for index in range(count):
        draw = Draw(0, 0, step, index)
        torch.manual_seed(draw.torch_seed("dropout"))
        for one in recipe.iteration(net, micro_batch(index), draw, progress_at(step)):
            (one.loss / count).backward()


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
@pytest.mark.parametrize(("step", "count"), [(0, 1), (3, 1), (2, 3)])
def test_gradient_is_that_of_a_bare_loop(recipe: Recipe, step: int, count: int) -> None:
    torch.manual_seed(0)
    net = recipe.build(3)
    reference = copy.deepcopy(net)
    run_step(recipe, net, step, count)
    bare_loop(recipe, reference, step, count)
    for (name, got), want in zip(net.named_parameters(), reference.parameters(), strict=True):
        expected = torch.zeros_like(want) if want.grad is None else want.grad
        torch.testing.assert_close(
            got.grad, expected, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_parameter_that_no_pass_touched_has_a_zero_gradient() -> None:
    net = PerSample().build(3)
    run_step(PerSample(), net, 0, 1)
    assert torch.equal(net["heads"][3].weight.grad, torch.zeros(3, 6))


def test_dropout_is_the_micro_batch_s_own() -> None:
    """Which units are dropped depends on the micro-batch's index, not on what ran before."""
    recipe = Plain(dropout=0.5)
    torch.manual_seed(0)
    net = recipe.build(3)
    together = run_step(recipe, net, 5, 2)
    net.zero_grad()
    torch.rand(17)
    again = run_step(recipe, net, 5, 2)
    assert torch.equal(torch.stack(together), torch.stack(again))
    assert not torch.equal(torch.stack(together), torch.stack(run_step(recipe, net, 6, 2)))


@dataclass(frozen=True, kw_only=True)
class Miscounts(Plain):
    declared: int

    def passes(self, progress: Progress) -> int:
        return self.declared

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        for _ in range(2):
            yield Pass("p", net(batch.images).mean())


@pytest.mark.parametrize(
    ("declared", "said"),
    [(3, "declares 3, and Miscounts.iteration.. yields 2"), (1, "declares 1, and Miscounts.iteration.. yields more")],
)
def test_another_number_of_passes_than_declared_names_the_recipe(declared: int, said: str) -> None:
    recipe = Miscounts(declared=declared)
    with pytest.raises(UserError, match=f"Miscounts.passes.. {said}"):
        run_step(recipe, recipe.build(3), 0, 1)


@dataclass(frozen=True, kw_only=True)
class NoScalar(Plain):
    detached: bool

    def iteration(self, net: nn.Module, batch: Batch, draw: Draw, progress: Progress) -> Iterator[Pass]:
        logits = net(batch.images)
        yield Pass("p", logits.mean().detach() if self.detached else logits)


@pytest.mark.parametrize("detached", [False, True])
def test_loss_without_graph_or_with_a_shape_is_refused(detached: bool) -> None:
    recipe = NoScalar(detached=detached)
    with pytest.raises(UserError, match="no scalar with a graph"):
        run_step(recipe, recipe.build(3), 0, 1)


def test_frozen_part_stays_as_it_is() -> None:
    """In evaluation mode, without gradient and without optimizer state."""
    recipe = TwoStages()
    torch.manual_seed(0)
    net = recipe.build(3)
    before = copy.deepcopy(net.state_dict())
    set_learning(net, recipe.stages()[0])
    optimizer = make_optimizer(net, Optimization(lr=0.1, momentum=0.9))
    for step in range(3):
        run_step(recipe, net, step, 2)
        update(optimizer, Precision("fp32", ALONE.device), lr=0.1, clip=None)
    after = net.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert len(optimizer.state_dict()["state"]) == 2
    assert not net.backbone.training
    assert net.head.training
    set_learning(net, recipe.stages()[1])
    assert net.backbone.training
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_stage_that_names_no_parameter_is_refused() -> None:
    with pytest.raises(UserError, match="learns 'neck'"):
        set_learning(Plain().build(3), Stage(learns=("neck",)))


def test_running_statistics_move_once_per_step_by_the_mean_of_micro_batches() -> None:
    torch.manual_seed(0)
    net = Plain().build(3)
    moved = []
    for index in range(3):
        alone = copy.deepcopy(net)
        alone(micro_batch(index).images)
        moved.append(alone.backbone[1].running_var)
    run_step(Plain(), net, 0, 3)
    torch.testing.assert_close(net.backbone[1].running_var, torch.stack(moved).mean(0))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_fp32_weights_to_nearly_the_same(precision: str) -> None:
    """fp16's loss is scaled for backward and unscaled once: the update is that of fp32 to rounding."""
    torch.manual_seed(0)
    net = Unequal().build(3)
    reference = copy.deepcopy(net)
    for one, name in ((net, precision), (reference, "fp32")):
        kind = Precision(name, ALONE.device)
        backend = wrap(one, ALONE, "single", Optimization(lr=0.1, clip=1.0), kind)
        step = 0
        while step < 4:
            accumulate(
                Unequal(),
                one,
                backend,
                RunningStatistics(one),
                [micro_batch(0), micro_batch(1)],
                [Draw(0, 0, step, 0), Draw(0, 0, step, 1)],
                progress_at(step),
                2,
            )
            # fp16's first scale may be too large: that step is left out, the scale halved, and it is taken again.
            step += backend.update(0.1).nonfinite.item() == 0.0
    for got, want in zip(net.parameters(), reference.parameters(), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_step_with_a_gradient_that_is_not_finite_is_left_out() -> None:
    torch.manual_seed(0)
    net = Plain().build(3)
    optimizer = make_optimizer(net, Optimization(lr=0.1))
    run_step(Plain(), net, 0, 1)
    update(optimizer, Precision("fp32", ALONE.device), lr=0.1, clip=None)
    before = copy.deepcopy(net.state_dict())
    momentum = copy.deepcopy(optimizer.state_dict()["state"])
    run_step(Plain(), net, 1, 1)
    net.head.bias.grad[0] = torch.inf
    done = update(optimizer, Precision("fp32", ALONE.device), lr=0.1, clip=1.0)
    assert done.nonfinite.item() == 1.0
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name])
    for index, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], momentum[index]["momentum_buffer"])


def test_clipping_scales_the_gradient_to_the_norm() -> None:
    """One SGD step without momentum moves the weights by lr times the clipped norm."""
    torch.manual_seed(0)
    net = Plain().build(3)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = make_optimizer(net, Optimization(momentum=0.0, weight_decay=0.0))
    run_step(Plain(), net, 0, 1)
    done = update(optimizer, Precision("fp32", ALONE.device), lr=1.0, clip=0.05)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, net.parameters(), strict=True)])
    assert done.norm.item() > 0.05
    assert moved.norm().item() == pytest.approx(0.05, rel=1e-4)


def test_weight_decay_spares_what_the_authors_spare() -> None:
    """Batch norm, biases and depthwise kernels do not decay; dense kernels and linear weights do."""
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Linear(8, 2))
    groups = make_optimizer(net, Optimization(weight_decay=0.1)).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed == {id(net[0].weight), id(net[3].weight)}
    everything = make_optimizer(net, Optimization(weight_decay=0.1, decay="all")).param_groups
    assert len(everything) == 1


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("linear", 0, 0.5),
        ("linear", 1, 1.0),
        ("linear", 2, 1.0),
        ("linear", 6, 0.5),
        ("linear", 9, 0.125),
        ("cosine", 6, 0.5),
        ("constant", 9, 1.0),
    ],
)
def test_schedule_climbs_and_falls_per_step(schedule: str, step: int, factor: float) -> None:
    """Ten steps, two of them warm-up; the fall would reach 0 at step 10."""
    assert learning_rate(step, 10, 2, schedule) == pytest.approx(factor)
