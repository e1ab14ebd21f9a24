"""REINFORCE (Williams, 1992) for decisions that open and close blocks, image by image.

Shapes: B images, N decisions each. Every function checks them: a (B,) against a (B, 1) would silently make (B, B), and
each image would be credited with all others' rewards.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def bounded(probability: Tensor, alpha: float) -> Tensor:
    """alpha p + (1 - alpha)(1 - p): in [1 - alpha, alpha], so that exploration never ends (BlockDrop section 3.3)."""
    return alpha * probability + (1 - alpha) * (1 - probability)


def sample(probability: Tensor, generator: torch.Generator) -> Tensor:
    """Actions 0 or 1, 1 with this probability, of the same shape; without gradient."""
    return torch.bernoulli(probability.detach(), generator=generator)


def log_probability(probability: Tensor, actions: Tensor) -> Tensor:
    """log[p u + (1 - p)(1 - u)], (B, N): BlockDrop's Eq. 5, whose printed exponent is a slip.

    Raises:
        ValueError: the shapes differ.
    """
    _same(probability, actions)
    likely = probability * actions + (1 - probability) * (1 - actions)
    return likely.clamp_min(1e-8).log()


def returns_to_go(rewards: Tensor, last: Tensor | None = None) -> Tensor:
    """The sum of each decision's own reward and all later ones, (B, N); `last` (B,) comes at the end of all."""
    total = rewards.flip(1).cumsum(1).flip(1)
    if last is None:
        return total
    if last.shape != rewards.shape[:1]:
        raise ValueError(f"The last reward is one per image, ({len(rewards)},), not {tuple(last.shape)}.")
    return total + last[:, None]


def policy_loss(log_probabilities: Tensor, returns: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """A scalar whose gradient is minus the policy gradient: -sum_i log p_i r_i, over images as `reduction` says.

    Args:
        log_probabilities: (B, N), with graph.
        returns: (B, N), or (B,) if all decisions of an image share one; taken as constants.
        reduction: over images; decisions add up in any case.

    Raises:
        ValueError: the shapes do not match.
    """
    if returns.ndim == 1:
        if returns.shape != log_probabilities.shape[:1]:
            raise ValueError(f"Returns {tuple(returns.shape)} do not match {tuple(log_probabilities.shape)}.")
        returns = returns[:, None].expand_as(log_probabilities)
    _same(log_probabilities, returns)
    per_image = -(log_probabilities * returns.detach()).sum(1)
    return per_image.mean() if reduction == "mean" else per_image.sum()


def entropy(probability: Tensor) -> Tensor:
    """Of each decision, (B, N), in nats."""
    p = probability.clamp(1e-8, 1 - 1e-8)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def _same(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or one.ndim != 2:
        raise ValueError(f"Two tensors of (images, decisions) were expected: {tuple(one.shape)}, {tuple(other.shape)}.")
