"""torch.compile, for recipes that run a fixed set of computation graphs.

Each point of a network is a graph of its own. Beyond a limit of graphs torch goes on uncompiled with one warning, so
a recipe without a bound is refused, and for the others reaching the limit is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pliant.errors import UserError
from pliant.experiment import Experiment


def graphs_to_compile(experiment: Experiment) -> int | None:
    """How many graphs the experiment's passes need; None where it is not to be compiled.

    Raises:
        UserError: they have no bound.
    """
    if not experiment.compile:
        return None
    graphs = experiment.recipe.graphs()
    if isinstance(graphs, str):
        raise UserError(
            f"This run cannot be compiled: {graphs}. Leave --compile out, or train an S-Net, an I-Net or a plain "
            "network."
        )
    return graphs


def compile_net(net: nn.Module, graphs: int, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles the network's forward in place, at its first call with each point.

    Args:
        graphs: different points that training asks for. Evaluation, on copies, stays as it is.
        backend: of torch.compile.
    """
    import torch._dynamo.config  # takes a second

    torch._dynamo.config.recompile_limit = 4 * graphs + 4
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    net.compile(dynamic=False, fullgraph=True, backend=backend)
