"""SkipNet, BlockDrop and URNet: the algebra of their iterations, on networks small enough to check by hand."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.engine.optimization import set_learning
from pliant.errors import UserError
from pliant.methods.blockdrop import BlockDrop
from pliant.methods.fixed_blocks import FixedBlocks, distributed
from pliant.methods.skipnet import SkipNet, straight_through
from pliant.methods.urnet import URNet
from pliant.networks.execution import runner
from pliant.networks.gated import threshold
from pliant.networks.resnet import ResNet, cost
from pliant.randomness import Draw
from pliant.recipe import Batch, Measurement, Native, Pass, Progress, Recipe, Scale, Width, parse_point
from tests.small_recipes import unmixed

SMALL = ResNet(depth=14)
IMAGES = 6


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(IMAGES, 3, 16, 16, generator=generator)
    return unmixed(images, torch.randint(5, (IMAGES,), generator=generator))


def at(stage: int, share: float = 0.0, recipe: Recipe | None = None) -> Progress:
    return Progress(stage=stage, step=int(1000 * share), steps=1000, epoch=0, run_share=0.0)


def built(recipe: Recipe, stage: int = 0) -> nn.Module:
    torch.manual_seed(0)
    net = recipe.build(5)
    set_learning(net, recipe.stages()[stage])
    return net


def only(passes: Iterator[Pass]) -> Pass:
    (one,) = list(passes)
    return one


def idle_gates(recipe: Recipe) -> bool:
    """Whether nothing heeds what the gates say: blocks are dropped at random, or given."""
    return (
        isinstance(recipe, FixedBlocks)
        or (isinstance(recipe, SkipNet) and recipe.learning == "sdv")
        or (isinstance(recipe, URNet) and recipe.variant in ("random", "random_test"))
    )


def learning_parts(recipe: Recipe, stage: int) -> tuple[str, ...]:
    """Beginnings of the names of what a stage teaches; a stage of everything teaches both."""
    learns = recipe.stages()[stage].learns
    if learns != ("",):
        return learns
    return ("backbone",) if idle_gates(recipe) else ("backbone", "gates")


ALL = [
    SkipNet(network=SMALL),
    SkipNet(network=SMALL, learning="soft", gate="pooled"),
    SkipNet(network=SMALL, learning="rl", gate="ff2"),
    SkipNet(network=SMALL, learning="sdv"),
    SkipNet(network=SMALL, learning="hrl", costs="macs", gate="ff1"),
    BlockDrop(network=SMALL),
    BlockDrop(network=SMALL, decide="block by block", baseline="none", entropy=0.1),
    BlockDrop(network=SMALL, decide="recurrent"),
    BlockDrop(network=SMALL, policy_share=0.2),
    URNet(network=SMALL),
    URNet(network=SMALL, variant="external"),
    URNet(network=SMALL, variant="random"),
    URNet(network=SMALL, variant="attention"),
    URNet(network=SMALL, variant="random_test"),
    URNet(network=SMALL, fixed=0.6),
    FixedBlocks(network=SMALL, rule="distribute", keep=4),
]


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_every_stage_yields_its_passes_and_every_point_an_answer(recipe: Any) -> None:
    """And all that a stage teaches learns, some of it in one step, some in another."""
    answered = unmixed(batch().images, torch.arange(IMAGES) % 5)  # some right, whatever the answer: rewards differ
    for stage, described in enumerate(recipe.stages()):
        net = built(recipe, stage)
        for name, parameter in net.named_parameters():
            assert parameter.requires_grad == name.startswith(described.learns), name
        for step in range(4):  # in one iteration all of a URNet's gates may be steps, through which nothing is learned
            passes = list(recipe.iteration(net, answered, Draw(0, stage, step, 0), at(stage, 0.9)))
            assert len(passes) == recipe.passes(at(stage, 0.9))
            for one in passes:
                one.loss.backward()
        parts = learning_parts(recipe, stage)
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        moved = [name for name, gradient in gradients.items() if gradient is not None and gradient.any()]
        for part in parts:
            assert any(name.startswith(part) for name in moved), part
        for name, gradient in gradients.items():
            assert (gradient is not None) == name.startswith(parts), name
    net.eval()
    for point in recipe.points():
        assert parse_point(str(point)) == point
        assert recipe.admits(point) is None
        with torch.no_grad():
            outcome = recipe.predict(net, batch().images, point)
            again = recipe.predict(net, batch().images, point)
        assert torch.equal(outcome.logits, again.logits), "a random baseline measures the same twice"
        assert outcome.macs.shape == (IMAGES,)
        assert outcome.marks["open"].shape == (IMAGES, SMALL.number_of_blocks)
        assert set(outcome.marks["open"].unique().tolist()) <= {0.0, 1.0}
        figures = recipe.figures(outcome.marks)
        assert figures["blocks"] == pytest.approx(outcome.marks["open"].sum(1).mean().item())


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: type(recipe).__name__)
def test_same_draw_gives_the_same_iteration_and_another_one_another(recipe: Any) -> None:
    for stage, described in enumerate(recipe.stages()):
        found = []
        for step in (3, 3, 4, 5, 6):
            net = built(recipe, stage)
            torch.rand(step)
            one = only(recipe.iteration(net, batch(), Draw(0, stage, step, 0), at(stage, 0.4)))
            found.append((one.loss.item(), *(value.item() for value in one.metrics.values())))
        assert found[0] == found[1]
        draws = described.name not in ("sp", "soft", "classify") and not isinstance(recipe, FixedBlocks)
        assert (len(set(found)) > 1) == draws


def test_grouped_execution_answers_as_masked() -> None:
    """The random ones too, which drop the same blocks either way; some blocks run for a few of the images alone."""
    images = batch().images + torch.linspace(-1, 1, IMAGES)[:, None, None, None]
    for recipe in (
        SkipNet(network=SMALL),
        BlockDrop(network=SMALL),
        URNet(network=SMALL),
        SkipNet(network=SMALL, learning="sdv"),
        URNet(network=SMALL, variant="random"),
    ):
        torch.manual_seed(2)
        net = recipe.build(5).eval()
        point = recipe.points()[len(recipe.points()) // 2]
        with torch.no_grad():
            for parameter in net.gates.parameters():  # as drawn, gates hardly differ between images
                parameter.mul_(4.0)
            masked = recipe.predict(net, images, point)
            grouped = dataclasses.replace(recipe, execution="grouped").predict(net, images.clone(), point)
        torch.testing.assert_close(grouped.logits, masked.logits, atol=1e-5, rtol=1e-4)
        assert torch.equal(grouped.marks["open"], masked.marks["open"])
        shares = masked.marks["open"].mean(0)
        assert ((shares > 0) & (shares < 1)).any(), f"{type(recipe).__name__} opens a block for all images or none"


# --- SkipNet


def test_straight_through_is_hard_forward_and_soft_backward() -> None:
    """Eq. 7."""
    logits = torch.tensor([-2.0, 0.0, 0.3], requires_grad=True)
    gate = straight_through(1, logits)
    assert gate.tolist() == [0.0, 1.0, 1.0]
    gate.sum().backward()
    soft = logits.detach().sigmoid()
    torch.testing.assert_close(logits.grad, soft * (1 - soft))


def test_first_block_of_a_skipnet_always_runs() -> None:
    recipe = SkipNet(network=SMALL, open_rate=0.01)
    net = built(recipe).eval()
    with torch.no_grad():
        outcome = recipe.predict(net, batch().images, Native())
    assert outcome.marks["open"][:, 0].tolist() == [1.0] * IMAGES
    assert outcome.marks["open"][:, 1:].sum() == 0
    backbone = cost(net.backbone, 16)
    gates = sum(net.gates.macs(net.backbone, 16))
    assert outcome.macs.tolist() == [backbone.always + backbone.residual[0] + gates] * IMAGES


def skips(net: nn.Module, opened: Tensor, costs: str) -> list[list[float]]:
    """C_i of each gated block that an image leaves out, image by image, with C_i = 1 or as the blocks' work has it."""
    blocks = cost(net.backbone, 16).residual[1:]
    weights = [macs * len(blocks) / sum(blocks) for macs in blocks] if costs == "macs" else [1.0] * len(blocks)
    return [[c * (1.0 - action) for c, action in zip(weights, row, strict=True)] for row in opened[:, 1:].tolist()]


def assert_same_gradients(net: nn.Module, reference: nn.Module) -> None:
    for (name, mine), theirs in zip(net.named_parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None, name
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.parametrize(
    ("temperature", "beta", "costs"),
    [(1.0, 0.9, "equal"), (0.2, 0.9, "equal"), (1.0, None, "equal"), (1.0, 0.9, "macs")],
)
def test_skipnet_s_gradient_is_eq_6(temperature: float, beta: float | None, costs: Any) -> None:
    """Against the formula written out, decision by decision and image by image; a temperature divides the logits.
    Without a beta the loss weighs as much as one block, alpha / N."""
    recipe = SkipNet(
        network=SMALL,
        learning="hrl",
        alpha=0.7,
        beta=beta,
        rl_weight=0.5,
        gate="pooled",
        temperature=temperature,
        costs=costs,
    )
    net = built(recipe)
    reference = copy.deepcopy(net)
    draw = Draw(0, 0, 5, 0)
    only(recipe.iteration(net, batch(), draw, at(0))).loss.backward()
    generator = draw.generator(purpose="gates")
    walk = reference(
        batch().images,
        lambda number, z: torch.bernoulli((z.detach() / temperature).sigmoid(), generator=generator),
        runner("masked", "around"),
    )
    losses = cross_entropy(walk.logits, batch().labels, reduction="none")
    gates = walk.gate_logits.shape[1]
    weight = 0.7 / gates if beta is None else beta
    total = losses.mean()
    for image, skipped in enumerate(skips(net, walk.open, costs)):
        for gate in range(gates):
            action, p = walk.open[image, gate + 1], (walk.gate_logits[image, gate] / temperature).sigmoid()
            r = -(weight * losses[image].detach() - 0.7 / gates * sum(skipped[gate:]))
            total = total - 0.5 * (p if action == 1 else 1 - p).log() * r / IMAGES
    total.backward()
    assert_same_gradients(net, reference)


@pytest.mark.parametrize("costs", ["equal", "macs"])
def test_answer_is_the_last_action_of_a_skipnet_without_supervision(costs: Any) -> None:
    """It is drawn from the classes' probabilities; a right one is rewarded with 1, and so are all decisions before."""
    recipe = SkipNet(network=SMALL, learning="rl", alpha=0.7, gate="pooled", costs=costs)
    net = built(recipe)
    reference = copy.deepcopy(net)
    images, draw = batch().images, Draw(0, 0, 5, 0)
    generator = draw.generator(purpose="gates")
    walk = reference(
        images,
        lambda number, z: torch.bernoulli(z.detach().sigmoid(), generator=generator),
        runner("masked", "around"),
    )
    chances = walk.logits.softmax(1)
    answers = torch.multinomial(chances.detach(), 1, generator=generator)[:, 0]
    labels = (answers + torch.arange(IMAGES) % 2) % 5  # every other answer is right
    only(recipe.iteration(net, unmixed(images, labels), draw, at(0))).loss.backward()
    gates = walk.gate_logits.shape[1]
    total = torch.zeros(())
    for image, skipped in enumerate(skips(net, walk.open, costs)):
        right = float(answers[image] == labels[image])
        for gate in range(gates):
            action, p = walk.open[image, gate + 1], walk.gate_logits[image, gate].sigmoid()
            r = 0.7 / gates * sum(skipped[gate:]) + right
            total = total - (p if action == 1 else 1 - p).log() * r / IMAGES
        total = total - chances[image, answers[image]].log() * right / IMAGES
    total.backward()
    assert_same_gradients(net, reference)


def test_costs_of_blocks_have_mean_1() -> None:
    recipe = SkipNet(network=SMALL, costs="macs")
    costs = recipe._costs(built(recipe), 16, torch.zeros(1, 5))
    assert costs.shape == (1, 5)
    assert costs.mean().item() == pytest.approx(1.0)
    assert costs[0, 1] < costs[0, 2], "a block that halves the resolution is cheaper than the next one"


# --- BlockDrop


def test_policy_network_may_learn_the_classes_first() -> None:
    """It learns them as a network of its own would, and then which blocks each class runs."""
    recipe = BlockDrop(network=SMALL, policy_share=0.2)
    assert [stage.name for stage in recipe.stages()] == ["classify", "curriculum", "joint"]
    assert sum(stage.share for stage in recipe.stages()) == pytest.approx(1.0)
    net = built(recipe)
    alone = copy.deepcopy(net.gates.net)
    only(recipe.iteration(net, batch(), Draw(0, 0, 3, 0), at(0))).loss.backward()
    cross_entropy(alone(batch().images), batch().labels).backward()
    for name, parameter in alone.named_parameters():
        assert torch.equal(net.gates.net.get_parameter(name).grad, parameter.grad), name
    assert net.gates.fc.weight.grad is None
    assert (recipe.decided(at(1)), recipe.decided(at(1, 0.9))) == (1, SMALL.number_of_blocks)


def test_policy_by_class_is_the_mean_of_the_classes_decisions() -> None:
    net = built(BlockDrop(network=SMALL, policy_share=0.2, open_rate=0.8)).eval()
    gates = net.gates
    with torch.no_grad():
        ask = gates.begin(batch().images, None)
        answer = torch.stack([ask(number, batch().images) for number in range(SMALL.number_of_blocks)], 1)
        by_class = gates.GAIN * (gates.fc.weight.T + gates.fc.bias)
        torch.testing.assert_close(answer, gates.classes(batch().images).softmax(1) @ by_class)
    assert (gates.GAIN * gates.fc.bias).sigmoid().tolist() == pytest.approx([0.8] * SMALL.number_of_blocks)
    assert gates.net.fc.bias.abs().max() < 1, "what tells the classes is left as drawn"
    assert sum(gates.macs(net.backbone, 32)) == cost(gates.net, 32).total + 5 * SMALL.number_of_blocks


def test_all_blocks_run_where_the_policy_network_is_in_doubt_of_the_class() -> None:
    """As many images as it is unsure of; they teach its decisions nothing."""
    net = built(BlockDrop(network=SMALL, policy_share=0.2, open_rate=0.2)).eval().requires_grad_(True)
    wrong = 1 - net.gates.classes(batch().images).softmax(1).amax(1)
    net.gates.doubt = wrong.median().item()
    ask = net.gates.begin(batch().images, None)
    logits = torch.stack([ask(number, batch().images) for number in range(SMALL.number_of_blocks)], 1)
    unsure = wrong > net.gates.doubt
    assert 0 < unsure.sum() < len(unsure)
    assert (logits[unsure] > 5).all() and (logits[~unsure] < 0).all()
    (gradient,) = torch.autograd.grad(logits[unsure].sum(), net.gates.fc.weight, retain_graph=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(logits[~unsure].sum(), net.gates.fc.weight)
    assert gradient.any()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_reward_is_eq_3(gamma: float) -> None:
    recipe = BlockDrop(network=SMALL)
    logits = torch.eye(5)[:3]
    opened = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    got = recipe.reward(logits, torch.tensor([0, 0, 2]), opened, 4, gamma)
    torch.testing.assert_close(got, torch.tensor([1 - (5 / 6) ** 2, -gamma, 1 - (4 / 6) ** 2]))


def test_penalty_of_a_wrong_answer_may_grow_in_the_curriculum() -> None:
    recipe = BlockDrop(network=SMALL, gamma_from=0.1, gamma=1.0)
    assert [recipe.penalty(at(0, share)) for share in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.1**0.5, 1.0])
    assert BlockDrop(network=SMALL, gamma=2.0).penalty(at(0, 0.3)) == 2.0


def test_curriculum_grows_from_the_last_block() -> None:
    recipe = BlockDrop(network=SMALL, grow=0.5)
    decided = [recipe.decided(at(0, share)) for share in (0.0, 0.1, 0.25, 0.49, 0.5, 0.9)]
    assert decided == [1, 2, 4, 6, 6, 6]
    assert recipe.decided(at(1, 0.0)) == 6
    assert BlockDrop(network=SMALL, curriculum=False).decided(at(0, 0.0)) == 6


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("decide", ["once", "block by block", "recurrent"])
def test_baseline_is_the_reward_of_what_it_does_by_itself(
    decide: Any, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recurrent policy begins anew for it: what the sampled actions left in its state has no say."""
    recipe = BlockDrop(network=SMALL, decide=decide, alpha=0.6)
    net = built(recipe, stage).eval()
    with torch.no_grad():
        for parameter in net.gates.parameters():
            parameter.mul_(8.0)  # decisions that hang on what was decided before
    images = batch().images
    alone = recipe.predict(net, images, Native()).marks["open"]
    rewarded: list[Tensor] = []

    def kept(self: BlockDrop, logits: Tensor, labels: Tensor, opened: Tensor, always: int, gamma: float) -> Tensor:
        rewarded.append(opened)
        return torch.zeros(len(labels))

    monkeypatch.setattr(BlockDrop, "reward", kept)
    only(recipe.iteration(net, batch(), Draw(0, stage, 3, 0), at(stage, 0.9)))
    sampled, greedy = rewarded
    assert not torch.equal(sampled, greedy)
    assert torch.equal(greedy, alone)


def test_curriculum_s_gradient_is_eq_6_and_its_network_stays() -> None:
    recipe = BlockDrop(network=SMALL, grow=0.5, alpha=0.8, gamma=2.0)
    net = built(recipe)
    before = copy.deepcopy(net.backbone.state_dict())
    reference = copy.deepcopy(net)
    draw, progress, images = Draw(0, 0, 7, 0), at(0, 0.25), batch().images  # the last four of six blocks are decided

    def answer(actions: Tensor) -> Tensor:
        gates = torch.cat([torch.ones(IMAGES, 2), actions], 1)
        with torch.no_grad():
            return reference.backbone(images, lambda number, x: gates[:, number], runner("masked", "inside")).argmax(1)

    s = reference.gates.logits(images, None).sigmoid()[:, 2:]
    greedy = (s >= 0.5).float()
    labels = answer(greedy)  # the likeliest policy is right, and sampled ones may be wrong
    one = only(recipe.iteration(net, unmixed(images, labels), draw, progress))
    one.loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.state_dict().items())

    bound = 0.8 * s + 0.2 * (1 - s)
    generator = draw.generator(purpose="policy")
    u = torch.stack([torch.bernoulli(bound[:, k].detach(), generator=generator) for k in range(4)], 1)

    def reward(actions: Tensor) -> Tensor:
        return torch.where(answer(actions) == labels, 1 - ((actions.sum(1) + 2) / 6) ** 2, torch.tensor(-2.0))

    advantage = reward(u) - reward(greedy)
    likely = (bound * u + (1 - bound) * (1 - u)).log().sum(1)
    (-(likely * advantage).mean()).backward()
    for mine, theirs in zip(net.gates.parameters(), reference.gates.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-4)
    assert advantage.abs().sum() > 0


def test_gradient_of_joint_fine_tuning_is_algorithm_1_s() -> None:
    """Cross-entropy along the sampled blocks, and the policy gradient of Eq. 6 with them."""
    recipe = BlockDrop(network=SMALL, alpha=0.8, joint_gamma=3.0)
    net = built(recipe, stage=1)
    reference, aside = copy.deepcopy(net), copy.deepcopy(net)
    images, draw = batch().images, Draw(0, 1, 7, 0)

    def answer(among: nn.Module, actions: Tensor) -> Tensor:
        return among.backbone(images, lambda number, x: actions[:, number], runner("masked", "inside"))

    s = reference.gates.logits(images, None).sigmoid()
    bound = 0.8 * s + 0.2 * (1 - s)
    generator = draw.generator(purpose="policy")
    u = torch.stack([torch.bernoulli(bound[:, k].detach(), generator=generator) for k in range(6)], 1)
    greedy = (s >= 0.5).float()
    logits, plain = answer(reference, u), answer(aside, greedy).argmax(1)
    labels = torch.where(torch.arange(IMAGES) % 2 == 0, plain, logits.argmax(1))  # each policy is right here and there

    def reward(right: Tensor, actions: Tensor) -> Tensor:
        return torch.where(right, 1 - (actions.sum(1) / 6) ** 2, torch.tensor(-3.0))

    advantage = reward(logits.argmax(1) == labels, u) - reward(plain == labels, greedy)
    assert advantage.unique().numel() > 2
    likely = (bound * u + (1 - bound) * (1 - u)).log().sum(1)
    (cross_entropy(logits, labels) - (likely * advantage).mean()).backward()
    only(recipe.iteration(net, unmixed(images, labels), draw, at(1))).loss.backward()
    assert_same_gradients(net, reference)


def test_baseline_of_joint_fine_tuning_leaves_running_statistics_alone() -> None:
    """They move once, by the sampled pass."""
    recipe = BlockDrop(network=SMALL)
    net = built(recipe, stage=1)
    reference = copy.deepcopy(net)
    draw = Draw(0, 1, 2, 0)
    only(recipe.iteration(net, batch(), draw, at(1)))
    only(dataclasses.replace(recipe, baseline="none").iteration(reference, batch(), draw, at(1)))
    for (name, mine), theirs in zip(net.named_buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def test_best_checkpoint_goes_by_what_the_method_is_rewarded_for() -> None:
    """All blocks for a tenth of a point more are no better."""

    def measured(top1: float, loss: float, blocks: float) -> list[Measurement]:
        figures = {"blocks": blocks, "blocks_sd": 0.0, "policies": 1.0}
        return [Measurement(point="native", images=100, top1=top1, top5=1.0, loss=loss, figures=figures)]

    few, all_of_them = measured(0.900, 0.30, 3.0), measured(0.901, 0.29, 6.0)
    for recipe in (BlockDrop(network=SMALL), SkipNet(network=SMALL)):
        assert recipe.score(few) > recipe.score(all_of_them)
    assert BlockDrop(network=SMALL, joint_gamma=2.0).score(few) == pytest.approx(0.9 * (1 - 0.25) - 2.0 * 0.1)
    assert SkipNet(network=SMALL, alpha=0.5).score(few) == pytest.approx(-0.3 + 0.5 * 3 / 5)
    sp = SkipNet(network=SMALL, learning="sp")
    assert sp.score(few) < sp.score(all_of_them)


@pytest.mark.parametrize(
    ("groups", "keep", "kept"),
    [((5, 5, 5), 10, (0, 1, 2, 3, 5, 6, 7, 10, 11, 12)), ((3, 4, 2), 8, (0, 1, 2, 3, 4, 5, 7, 8)), ((2, 2), 0, ())],
)
def test_distribute_k_spreads_blocks_over_groups(groups: tuple[int, ...], keep: int, kept: tuple[int, ...]) -> None:
    assert distributed(groups, keep) == kept


def test_fixed_blocks_run_alone() -> None:
    for recipe, kept in (
        (FixedBlocks(network=SMALL, rule="first", keep=2), (0, 1)),
        (FixedBlocks(network=SMALL, rule="given", blocks=(5, 2)), (2, 5)),
    ):
        assert recipe.kept() == kept
        with torch.no_grad():
            outcome = recipe.predict(built(recipe).eval(), batch().images, Native())
        assert outcome.marks["open"].sum(0).nonzero()[:, 0].tolist() == list(kept)
    draws = {FixedBlocks(network=SMALL, rule="random", keep=3, draw=draw).kept() for draw in range(20)}
    assert len(draws) > 5
    assert all(len(kept) == 3 for kept in draws)


# --- URNet


@pytest.mark.parametrize("variant", ["urnet", "external"])
def test_standardised_scale_is_read_less_its_mean_over_its_deviation(variant: Any) -> None:
    """Of a uniform S from 0.4 to 1: 0.7, and 0.6 over the root of 12."""
    plain = built(URNet(network=SMALL, variant=variant, smallest=0.4)).eval()
    other = built(URNet(network=SMALL, variant=variant, smallest=0.4, standardise=True)).eval()
    images, walked = batch().images, runner("masked", "inside")
    with torch.no_grad():
        want = plain(images, threshold, walked, (0.9 - 0.7) / (0.6 / 12**0.5)).gate_logits
        assert torch.allclose(other(images, threshold, walked, 0.9).gate_logits, want, atol=1e-5)
        assert not torch.allclose(plain(images, threshold, walked, 0.9).gate_logits, want, atol=1e-2)


def test_gates_that_read_a_standardised_scale_follow_it_sooner() -> None:
    """By SGD, of the scale loss alone."""

    def rise(standardise: bool) -> float:
        recipe = URNet(network=SMALL, gates_p=1.0, beta=12.0, standardise=standardise)
        net = built(recipe)
        optimizer = torch.optim.SGD(net.gates.parameters(), lr=0.05, momentum=0.9)
        for step in range(30):
            optimizer.zero_grad()
            scale = recipe.scale(Draw(0, 0, step, 0), at(0))
            opened = net(
                batch().images, lambda number, logits: logits.sigmoid(), runner("masked", "inside"), scale
            ).open
            (recipe.beta * recipe.scale_loss(opened, scale)).backward()
            optimizer.step()
        small, large = (
            net(batch().images, threshold, runner("masked", "inside"), one).gate_logits.sigmoid().mean().item()
            for one in (0.2, 1.0)
        )
        return large - small

    assert rise(standardise=True) > 2 * rise(standardise=False)


def test_scale_loss_is_eq_4_per_image() -> None:
    opened = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    recipe = URNet(network=SMALL)
    assert recipe.scale_loss(opened, 0.5).item() == pytest.approx(0.25**2)
    assert dataclasses.replace(recipe, per_image=False).scale_loss(opened, 0.5).item() == 0.0


def test_gates_are_sigmoids_with_probability_p_for_the_whole_batch() -> None:
    recipe = URNet(network=SMALL, p=0.3)
    logits = torch.tensor([-1.0, 0.5, 2.0])
    soft = 0
    for step in range(200):
        act = recipe._act(Draw(0, 0, step, 0), 0.5, batch().images, recipe.p)
        other = recipe._act(Draw(0, 0, step, 1), 0.5, batch().images, recipe.p)
        for number in range(SMALL.number_of_blocks):
            gate = act(number, logits)
            assert torch.equal(gate, other(number, logits)), "all micro-batches of a step alike"
            is_soft = torch.equal(gate, logits.sigmoid())
            assert is_soft or gate.tolist() == [0.0, 1.0, 1.0]
            soft += is_soft
    assert soft / (200 * SMALL.number_of_blocks) == pytest.approx(0.3, abs=0.04)


def test_while_gates_learn_alone_they_may_be_sigmoids_more_often() -> None:
    def share(recipe: URNet, stage: int) -> float:
        """Of the iterations in which the open blocks are no whole number."""
        net = built(recipe, stage)
        steps = [next(recipe.iteration(net, batch(), Draw(0, stage, step, 0), at(stage))) for step in range(20)]
        opened = [one.metrics["open"].item() * SMALL.number_of_blocks * IMAGES for one in steps]
        return sum(abs(blocks - round(blocks)) > 1e-3 for blocks in opened) / len(steps)

    assert share(URNet(network=SMALL, p=0.0001, gates_p=1.0), stage=0) > 0.9
    assert share(URNet(network=SMALL, p=0.0001, gates_p=1.0), stage=1) == 0.0
    assert share(URNet(network=SMALL, p=0.0001), stage=0) == 0.0


def test_scale_is_drawn_between_its_bounds_once_per_step() -> None:
    recipe = URNet(network=SMALL, smallest=0.2, largest=0.9)
    scales = [recipe.scale(Draw(0, 0, step, 0), at(0)) for step in range(300)]
    assert 0.2 <= min(scales) < 0.25
    assert 0.85 < max(scales) <= 0.9
    assert recipe.scale(Draw(0, 0, 5, 0), at(0)) == recipe.scale(Draw(0, 0, 5, 3), at(0))


def test_fixed_scale_is_annealed_with_noise() -> None:
    """Once, from the run's begin: it does not start anew with the second stage."""
    recipe = URNet(network=SMALL, fixed=0.5, anneal=0.1, noise=0.0)
    after = [dataclasses.replace(at(stage), run_share=share) for stage, share in ((0, 0.0), (0, 0.05), (1, 0.2))]
    scales = [recipe.scale(Draw(0, 0, 0, 0), progress) for progress in after]
    assert scales == pytest.approx([1.0, 0.75, 0.5])
    noisy = dataclasses.replace(recipe, noise=0.1)
    scales = torch.tensor([noisy.scale(Draw(0, 0, step, 0), after[-1]) for step in range(400)])
    assert scales.mean().item() == pytest.approx(0.5, abs=0.02)
    assert scales.std().item() == pytest.approx(0.1, abs=0.02)
    assert scales.max() <= 1.0


def test_gates_heed_the_scale_from_the_start() -> None:
    """A scale that reached only a wide layer unweighed would have no effect (methods notes 6.4)."""
    recipe = URNet(network=ResNet(depth=32))
    net = built(recipe).eval()
    with torch.no_grad():
        said = [net(batch().images, threshold, runner("masked", "inside"), scale).gate_logits for scale in (0.2, 1.0)]
    assert (said[0] - said[1]).abs().mean() > 0.02


def test_gates_alone_learn_first_over_a_network_that_stays() -> None:
    recipe = URNet(network=SMALL, p=1.0)
    net = built(recipe)
    before = copy.deepcopy(net.backbone.state_dict())
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        only(recipe.iteration(net, batch(), Draw(0, 0, step, 0), at(0))).loss.backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in net.backbone.state_dict().items())
    assert not net.backbone.training


def test_open_gates_give_the_backbone_s_answer() -> None:
    """A gate comes before the shortcut's addition, so an open network is the pretrained one."""
    for recipe in (URNet(network=SMALL), SkipNet(network=SMALL), BlockDrop(network=SMALL)):
        net = built(recipe).eval()
        with torch.no_grad():
            walk = net(batch().images, lambda number, z: torch.ones_like(z), recipe.masked(), 1.0)
            torch.testing.assert_close(walk.logits, net.backbone(batch().images))


def test_conditional_gates_cost_0_04_percent_of_resnet_110() -> None:
    recipe = URNet(network=ResNet(depth=110))
    net = recipe.build(10)
    share = sum(net.gates.macs(net.backbone, 32)) / cost(net.backbone, 32).total
    assert share == pytest.approx(0.0004, rel=0.1)
    imagenet = URNet(network=ResNet(form="imagenet", depth=101), reduction=16)
    large = imagenet.build(10)
    assert sum(large.gates.macs(large.backbone, 224)) / cost(large.backbone, 224).total < 0.001


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SkipNet(network=ResNet(depth=33)), "depth 6n . 2, not 33"),
        (lambda: SkipNet(network=SMALL, sp_share=1.0), "trains nothing"),
        (lambda: SkipNet(network=SMALL, alpha=-1.0), "--recipe.alpha cannot be -1: write 0 or more"),
        (lambda: BlockDrop(network=SMALL, joint_gamma=-5.0), "--recipe.joint-gamma cannot be -5: write 0 or more"),
        (lambda: URNet(network=SMALL, beta=float("nan")), "--recipe.beta cannot be nan: write 0 or more"),
        (lambda: BlockDrop(network=SMALL, alpha=1.0), "leaves no exploration"),
        (lambda: BlockDrop(network=SMALL, alpha=0.5), "leaves no exploration"),
        (lambda: BlockDrop(network=SMALL, curriculum_share=0.0), "trains nothing"),
        (lambda: BlockDrop(network=SMALL, policy_share=0.3), "nothing is left for joint fine-tuning"),
        (lambda: BlockDrop(network=SMALL, policy_share=0.1, decide="block by block"), "no policy network to train"),
        (lambda: BlockDrop(network=SMALL, gamma_from=0.0), "by a like factor each step"),
        (lambda: BlockDrop(network=SMALL, doubt=0.2), "asks a policy network that learned the classes first"),
        (lambda: BlockDrop(network=SMALL, policy_share=0.1, doubt=0.0), "write for instance --recipe.doubt 0.2"),
        (lambda: URNet(network=SMALL, gates_share=0.0), "trains nothing"),
        (lambda: URNet(network=SMALL, fixed=0.6, standardise=True), "leave --recipe.standardise out"),
        (lambda: URNet(network=SMALL, smallest=0.5, largest=0.5, standardise=True), "leave --recipe.standardise out"),
        (lambda: URNet(network=SMALL, gates_p=2.0), "write --recipe.gates-p"),
        (lambda: URNet(network=SMALL, smallest=0.5, largest=0.4), "Scales lie in"),
        (lambda: URNet(network=SMALL, gates_p=0.0), "that stage trains nothing"),
        (lambda: URNet(network=SMALL, anneal=0.0), "write --recipe.anneal"),
        (lambda: URNet(network=SMALL, noise=-1.0), "write --recipe.noise"),
        (lambda: URNet(network=SMALL, reduction=0), "write --recipe.reduction"),
        (lambda: URNet(network=SMALL, variant="attention", execution="grouped"), "leave --execution out"),
        (lambda: BlockDrop(network=SMALL, curriculum_batch=0), "write --recipe.curriculum-batch 1 or more"),
        (lambda: SkipNet(network=SMALL, learning="rl", label_smoothing=0.1), "no loss of the labels to smooth"),
        (lambda: URNet(network=SMALL, fixed=1.5), "A scale lies in"),
        *[
            (lambda method=method: method(network=SMALL, open_rate=1.0), "An open rate lies in")
            for method in (SkipNet, BlockDrop, URNet)
        ],
        (lambda: FixedBlocks(network=SMALL, rule="given", blocks=(6,)), "another number of blocks"),
        (lambda: FixedBlocks(network=SMALL, rule="given"), "are the rule given"),
        (lambda: FixedBlocks(network=SMALL, keep=3, blocks=(1,)), "are the rule given"),
        (lambda: FixedBlocks(network=SMALL, keep=7), "Of 6 blocks 7 cannot be kept"),
        (lambda: Scale(1.1), "A scale lies in"),
        (lambda: parse_point("S-1"), "A scale lies in"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()


def test_width_is_no_point_of_a_urnet() -> None:
    assert "write S and a share" in URNet(network=SMALL).admits(Width(0.5))
    assert URNet(network=SMALL).admits(Scale(0.33)) is None
