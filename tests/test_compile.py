"""Compiled, a fixed set of widths runs to the same losses, each width one graph, none left uncompiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounter

from pliant.engine.compilation import compile_net, graphs_to_compile
from pliant.errors import EXIT_USER_ERROR, UserError
from pliant.experiment import Experiment
from pliant.methods.s_net import SNet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from tests.runs import Launch, arguments, command, finish, losses, only_run, tiny_cifar

SMALL = MobileNet(full=0.25)


class Sliced(nn.Module):
    """Each number of channels is a graph."""

    def forward(self, x: torch.Tensor, channels: int) -> torch.Tensor:
        return x[:, :channels] * 2


def test_each_width_of_an_s_net_is_compiled_once() -> None:
    torch._dynamo.reset()
    recipe = SNet(network=SMALL, widths=(1.0, 0.5, 0.35))
    torch.manual_seed(0)
    net = recipe.build(3).double()
    images = torch.randn(4, 3, 32, 32).double()
    wanted = [logits.detach() for logits in net.at_each(images, recipe.widths)]
    counter = CompileCounter()
    compile_net(net, 3, backend=counter)
    for _ in range(3):
        got = [logits.detach() for logits in net.at_each(images, recipe.widths)]
    assert counter.frame_count == 3
    for mine, theirs in zip(got, wanted, strict=True):
        # Not to the last bit: the eager widths slice one stem, the compiled ones each compute their own.
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0.0)


def test_more_widths_than_declared_are_an_error_and_no_silent_fall_back() -> None:
    torch._dynamo.reset()
    net = Sliced()
    compile_net(net, 1, backend="eager")

    def ask_for_many_widths() -> None:
        for channels in range(1, 20):
            net(torch.randn(2, 20), channels)

    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        ask_for_many_widths()
    torch._dynamo.reset()


def test_free_widths_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="draws its widths freely"):
        graphs_to_compile(Experiment(name="us", recipe=USNet(network=SMALL), compile=True))
    assert graphs_to_compile(Experiment(name="us", recipe=USNet(network=SMALL, n=2), compile=True)) == 2
    assert graphs_to_compile(Experiment(name="us", recipe=USNet(network=SMALL))) is None


def test_refusal_is_one_sentence_before_anything_is_written(tmp_path: Path) -> None:
    data = tiny_cifar(tmp_path / "data")
    done = finish(command(*arguments(data, tmp_path / "runs"), "--compile"))
    assert done.returncode == EXIT_USER_ERROR
    assert "cannot be compiled" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.soak
@pytest.mark.parametrize("ranks", [1, 2])
def test_inductor_trains_to_the_losses_of_the_eager_network(tmp_path: Path, ranks: int) -> None:
    """Needs a C++ compiler; a sandwich of the smallest and the largest width alone has two graphs."""
    data = tiny_cifar(tmp_path / "data")
    given = {"recipe.n": 2, "optimization__steps": 3, "optimization__lr": 0.001}
    eager = finish(command(*arguments(data, tmp_path / "eager", **given)))
    assert eager.returncode == 0, eager.stderr
    compiled = command(*arguments(data, tmp_path / "compiled", **given), "--compile")
    for status, said in Launch(compiled, ranks).start().finish(patience=600):
        assert status == 0, said
    for got, want in zip(losses(only_run(tmp_path / "compiled")), losses(only_run(tmp_path / "eager")), strict=True):
        assert got == pytest.approx(want, abs=1e-3)
