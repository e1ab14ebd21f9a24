"""Runs augmented by plan: exact after a resume, the same on two ranks, with losses that learn from the targets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from pliant.engine.optimization import set_learning
from pliant.engine.session import train
from pliant.engine.verification import gathered
from pliant.errors import UserError
from pliant.experiment import Batching, Data, Experiment, Optimization, Saving
from pliant.methods.blockdrop import BlockDrop
from pliant.methods.depth import Plain
from pliant.methods.fixed_blocks import FixedBlocks
from pliant.methods.i_net import INet
from pliant.methods.s_net import SNet
from pliant.methods.skipnet import SkipNet
from pliant.methods.urnet import URNet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet
from pliant.networks.resnet import ResNet
from pliant.randomness import Draw
from pliant.recipe import Batch, Progress, Recipe
from tests import small_recipes
from tests.runs import Launch, arguments, begun_at, command, final_state, finish, losses, only_run, same, tiny_cifar
from tests.test_ranks import spawn
from tests.test_step import ALONE

RICH: dict[str, Any] = dict(
    augment="randaugment", erasing=0.4, erasing_mode="pixel", mixup=0.8, cutmix=1.0, mix_probability=0.7
)
TINY = USNet(network=MobileNet(full=0.25, divisor=4, stem_stride=2, late_stride=2), low=0.5, n=3, hard=0.5)
R8 = ResNet(depth=8)
MIXES: list[Recipe] = [
    INet(network=MobileNet(full=0.25), label_smoothing=0.1),
    SNet(network=MobileNet(full=0.25), widths=(1.0, 0.5)),
    TINY,
    Plain(network=R8, label_smoothing=0.1),
    FixedBlocks(network=R8, keep=2),
    *(SkipNet(network=R8, learning=learning) for learning in ("sp", "soft", "sdv")),
    *(URNet(network=R8, variant=variant) for variant in ("urnet", "external", "random", "attention")),
]
REFUSES: list[Recipe] = [
    BlockDrop(network=R8),
    *(SkipNet(network=R8, learning=learning) for learning in ("sp+hrl", "hrl", "rl")),
]


def short(recipe: Recipe) -> str:
    """The class, and which of its variants."""
    return "-".join([type(recipe).__name__, *(getattr(recipe, name, "") for name in ("learning", "variant"))])


def batch_with(targets: torch.Tensor, labels: torch.Tensor) -> Batch:
    images = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(images=images, labels=labels, targets=targets)


def losses_of(recipe: Recipe, batch: Batch) -> list[torch.Tensor]:
    """Of all passes of an iteration in each stage."""
    found = []
    for number, stage in enumerate(recipe.stages()):
        torch.manual_seed(0)
        net = recipe.build(10)
        set_learning(net, stage)
        progress = Progress(stage=number, step=3, steps=10, epoch=0, run_share=0.0)
        found += [one.loss.detach() for one in recipe.iteration(net, batch, Draw(0, number, 3, 0), progress)]
    return found


@pytest.mark.parametrize("recipe", MIXES, ids=short)
def test_recipe_that_admits_mixing_learns_from_the_targets_alone(recipe: Recipe) -> None:
    assert recipe.admits_mixing() is None
    labels = torch.arange(6)
    certain = one_hot(labels, 10).float()
    unmixed = losses_of(recipe, batch_with(labels, labels))
    torch.testing.assert_close(losses_of(recipe, batch_with(certain, labels)), unmixed)
    mixed = 0.7 * certain + 0.3 * certain.flip(0)
    learned = losses_of(recipe, batch_with(mixed, labels))
    torch.testing.assert_close(losses_of(recipe, batch_with(mixed, (labels + 1) % 10)), learned, atol=0, rtol=0)
    assert not torch.equal(learned[0], unmixed[0])


@pytest.mark.parametrize("recipe", [*REFUSES, small_recipes.RollOuts()], ids=short)
@pytest.mark.parametrize("mixes", [dict(mixup=0.2), dict(cutmix=1.0)], ids=str)
def test_recipe_that_rewards_right_answers_or_does_not_say_refuses_mixed_labels(recipe: Recipe, mixes: Any) -> None:
    with pytest.raises(UserError, match=r"(rewards right answers|Recipe\.admits_mixing).*--data\.mixup 0") as said:
        Experiment(name="a", recipe=recipe, data=Data(**mixes))
    assert str(said.value).endswith(".")
    Experiment(name="a", recipe=recipe, data=Data(augment="randaugment", erasing=0.25))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_cifar(tmp_path_factory.mktemp("data"))


def test_run_resumed_inside_an_epoch_ends_the_same(data: Path, tmp_path: Path) -> None:
    experiment = Experiment(
        name="rich",
        recipe=TINY,
        data=Data(source="cifar10", root=data, **RICH),
        batch=Batching(images=32, micro=8),
        optimization=Optimization(lr=0.1, steps=8),
        saving=Saving(every_steps=3, keep=9),
        evaluate_epochs=0.0,
        log_steps=1,
        threads=1,
        runs=tmp_path,
    )
    whole = train(experiment, ALONE).path
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    for later in ("step-00000006", "step-00000008"):
        shutil.rmtree(cut / "checkpoints" / later)
    train(replace(experiment, resume=str(cut)), ALONE)
    assert begun_at(cut) == [0, 3]
    one, two = final_state(whole), final_state(cut)
    assert all(same(one[name], two[name]) for name in ("net", "rows", "optimizer"))
    assert losses(cut) == losses(whole)


def test_two_ranks_train_what_one_trains(data: Path, tmp_path: Path) -> None:
    """Slowly and in fp64, as a difference in the last bit grows; the gradients of the first step are verified."""
    asked = {f"data.{name.replace('_', '-')}": value for name, value in RICH.items()}
    asked |= {"precision": "fp64", "optimization.lr": 1e-3, "optimization.steps": 4, "recipe.hard": 0.5}
    asked |= {"evaluate-epochs": 0}
    done = finish(command(*arguments(data, tmp_path / "one", **asked)))
    assert done.returncode == 0, done.stderr
    verified = asked | {"verify-gradients": 1}
    for status, said in Launch(command(*arguments(data, tmp_path / "two", **verified))).start().finish():
        assert status == 0, said
    one, two = (losses(only_run(tmp_path / name)) for name in ("one", "two"))
    assert len(one) == 4
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-9)


def _gathers(ranks: Any) -> None:
    def batch(index: int) -> Batch:
        labels = torch.arange(4) + index
        return batch_with(one_hot(labels, 10).float() * (0.5 + index), labels)

    found = gathered([batch(index) for index in ranks.share(3)], ranks, 3)
    for index, one in enumerate(found):
        assert torch.equal(one.labels, batch(index).labels)
        assert torch.equal(one.targets, batch(index).targets)


def test_verification_runs_on_the_targets_of_all_ranks() -> None:
    spawn(_gathers, 2)
