"""Losses against another network's answer.

Shapes: B images, K classes.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax


def soft_labels(logits: Tensor) -> Tensor:
    """Probabilities (B, K), fp32 or better, cut off from the graph: no student moves its teacher (US-Nets 4.2)."""
    return _precise(logits.detach()).softmax(dim=1)


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Mean over images of -sum_k p_k log q_k, at temperature 1; both (B, K)."""
    return -(probabilities * log_softmax(_precise(logits), dim=1)).sum(dim=1).mean()


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, probabilities: Tensor, *, hard: float, smoothing: float
) -> Tensor:
    """`hard` times the cross entropy with labels plus 1 - `hard` times that with probabilities (US-Nets 4.2)."""
    soft = soft_cross_entropy(logits, probabilities)
    if hard == 0.0:
        return soft
    return hard * cross_entropy(logits, labels, label_smoothing=smoothing) + (1.0 - hard) * soft


def _precise(logits: Tensor) -> Tensor:
    """In fp32 at least: autocast leaves bf16 logits, whose exponentials are coarse."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
