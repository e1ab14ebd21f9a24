"""The policy gradient against the exact one of a problem small enough to be enumerated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.engine.optimization import set_learning
from pliant.methods.blockdrop import BlockDrop
from pliant.methods.reinforce import bounded, entropy, log_probability, policy_loss, returns_to_go, sample
from pliant.networks.resnet import ResNet
from pliant.randomness import Draw
from pliant.recipe import Native
from tests.small_recipes import unmixed
from tests.test_depth_methods import at, batch, built, only

N = 3


def reward(actions: Tensor) -> Tensor:
    """Of each image's actions (B, 3), (B,); not linear in them, and unlike for the two images."""
    a, b, c = actions.T
    own = torch.tensor([1.0, -0.5])[: len(actions)]
    return own * (2 * a * b - c) + 0.7 * (1 - a) * c + 0.1


def exact_gradient(logits: Tensor) -> Tensor:
    """d E[R] / d logits, over all eight action sequences, averaged over images."""
    logits = logits.clone().requires_grad_()
    expected = torch.zeros(len(logits))
    for actions in itertools.product((0.0, 1.0), repeat=N):
        taken = torch.tensor(actions).expand(len(logits), N)
        chance = log_probability(logits.sigmoid(), taken).sum(1).exp()
        expected = expected + chance * reward(taken)
    expected.mean().backward()
    assert logits.grad is not None
    return logits.grad


def estimated_gradient(logits: Tensor, baseline: Tensor, draws: int, *, to_go: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    many = logits.repeat(draws, 1).requires_grad_()
    actions = sample(many.sigmoid(), generator)
    gained = torch.stack([reward(part) for part in actions.split(len(logits))]).flatten() - baseline.repeat(draws)
    returns = returns_to_go(torch.zeros_like(actions), gained) if to_go else gained
    policy_loss(log_probability(many.sigmoid(), actions), returns).backward()
    assert many.grad is not None
    return -many.grad.reshape(draws, *logits.shape).sum(0)


@pytest.mark.parametrize("baseline", [0.0, 0.8])
@pytest.mark.parametrize("to_go", [False, True])
def test_estimate_comes_to_the_exact_gradient(baseline: float, to_go: bool) -> None:
    """Whatever the baseline; image by image: mixing their rewards up would show."""
    logits = torch.tensor([[0.3, -0.7, 0.1], [1.2, 0.4, -0.9]])
    got = estimated_gradient(logits, torch.full((2,), baseline), 100_000, to_go=to_go)
    torch.testing.assert_close(got, exact_gradient(logits), atol=8e-3, rtol=0)


def curriculum_gradients(decide: Any, baseline: Any, draws: int) -> Tensor:
    """BlockDrop's, of all gates, a row for each draw of the actions; its likeliest policy answers rightly."""
    recipe = BlockDrop(network=ResNet(depth=8), decide=decide, baseline=baseline)
    net, images = built(recipe), batch().images
    with torch.no_grad():
        labels = recipe.predict(net.eval(), images, Native()).logits.argmax(1)
    set_learning(net, recipe.stages()[0])
    rows = []
    for step in range(draws):
        net.zero_grad()
        only(recipe.iteration(net, unmixed(images, labels), Draw(0, 0, step, 0), at(0, 0.9))).loss.backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in net.gates.parameters()]))
    return torch.stack(rows)


@pytest.mark.parametrize("decide", ["once", "block by block"])
def test_self_critical_baseline_lowers_the_variance_and_leaves_the_mean(decide: Any) -> None:
    """The reward of the likeliest actions, taken off: what all actions gain alike says nothing."""
    torch.set_num_threads(1)  # of so little work each, two would wait for each other
    draws = 100
    greedy, none = (curriculum_gradients(decide, baseline, draws) for baseline in ("greedy", "none"))
    assert greedy.var(0).sum() < 0.5 * none.var(0).sum()

    def mean_over_error(rows: Tensor) -> float:
        """The mean's squared length over what chance makes of it where there is none: about 1 then."""
        return (rows.mean(0).square().sum() / (rows.var(0).sum() / draws)).item()

    assert mean_over_error(greedy - none) < 4
    assert mean_over_error(none) > 10, "so many draws would show that a mean was moved"


def test_rewards_to_come_are_each_action_s_own_and_all_later_ones() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.0, 1.0, 0.0]])
    assert torch.equal(returns_to_go(rewards), torch.tensor([[7.0, 6.0, 4.0], [1.0, 1.0, 0.0]]))
    last = torch.tensor([10.0, -1.0])
    assert torch.equal(returns_to_go(rewards, last), torch.tensor([[17.0, 16.0, 14.0], [0.0, 0.0, -1.0]]))


def test_shapes_that_would_mix_images_up_are_refused() -> None:
    """(B,) against (B, 1) broadcasts to (B, B), and credits each image with the batch's average."""
    likely = torch.zeros(4, N, requires_grad=True)
    for returns in (torch.zeros(4, 1), torch.zeros(1, N), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"match|expected"):
            policy_loss(likely, returns)
    with pytest.raises(ValueError, match="expected"):
        log_probability(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="one per image"):
        returns_to_go(torch.zeros(4, N), torch.zeros(4, 1))


def test_returns_are_constants() -> None:
    value = torch.ones(2, requires_grad=True)
    probability = torch.full((2, N), 0.5, requires_grad=True)
    policy_loss(log_probability(probability, torch.ones(2, N)), value * 3).backward()
    assert value.grad is None
    assert probability.grad is not None


def test_sum_and_mean_differ_by_the_number_of_images() -> None:
    likely = torch.rand(5, N).log()
    returns = torch.randn(5)
    torch.testing.assert_close(policy_loss(likely, returns, "sum"), 5 * policy_loss(likely, returns))


def test_bounds_keep_exploring() -> None:
    probability = torch.tensor([[0.0, 0.5, 1.0]])
    torch.testing.assert_close(bounded(probability, 0.8), torch.tensor([[0.2, 0.5, 0.8]]))


def test_log_probability_is_that_of_a_bernoulli() -> None:
    probability = torch.rand(6, N) * 0.9 + 0.05
    actions = (torch.rand(6, N) < 0.5).float()
    want = torch.distributions.Bernoulli(probs=probability)
    torch.testing.assert_close(log_probability(probability, actions), want.log_prob(actions))
    torch.testing.assert_close(entropy(probability), want.entropy())


def test_certain_decisions_have_finite_logarithms() -> None:
    assert torch.isfinite(log_probability(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]))).all()
