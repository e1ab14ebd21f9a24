"""S-Nets, I-Nets and the distillation losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, one_hot

from pliant.errors import UserError
from pliant.methods.distillation import mixed_cross_entropy, soft_cross_entropy, soft_labels
from pliant.methods.i_net import INet
from pliant.methods.s_net import SNet
from pliant.networks.mobilenet import MobileNet
from pliant.networks.slimmable import SlimmableBatchNorm2d
from pliant.randomness import Draw
from pliant.recipe import Width
from tests.test_methods import CLASSES, TINY, at, batch, build, train

WIDTHS = (1.0, 0.5, 0.35)


@pytest.mark.parametrize("private", [False, True])
def test_s_net_trains_all_its_widths_on_the_labels_largest_first(private):
    recipe = SNet(network=TINY, widths=WIDTHS, private=private, label_smoothing=0.1)
    net = build(recipe)
    losses = train(recipe, net, Draw(0, 0, 0, 0), at())
    assert list(losses) == ["1x", "0.5x", "0.35x"]
    assert recipe.tracked() == recipe.points() == tuple(map(Width, WIDTHS))
    for width, (loss,) in zip(WIDTHS, losses.values(), strict=True):
        expected = cross_entropy(net(batch().images, width), batch().labels, label_smoothing=0.1)
        assert loss == pytest.approx(expected.item())


def norms(net: nn.Module) -> dict[str, SlimmableBatchNorm2d]:
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, SlimmableBatchNorm2d)}


@pytest.mark.parametrize("private", [False, True])
def test_each_width_of_an_s_net_moves_statistics_of_its_own_alone(private):
    """All but those of the stem and the first depthwise layer, whose channels see the same at every width."""
    net = build(SNet(network=TINY, widths=WIDTHS, private=private)).train()
    shared = set() if private else {"features.0.1", "features.1.conv.0.1"}
    for index, width in enumerate(WIDTHS):
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        with torch.no_grad():
            net(batch().images, width)
        moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
        own = {name: 0 if name in shared else index for name in norms(net)}
        assert moved == {f"{name}.{kind}_{number}" for name, number in own.items() for kind in ("mean", "var")}


def test_scales_are_shared_or_private_as_asked():
    shared, private = (build(SNet(network=TINY, widths=WIDTHS, private=private)) for private in (False, True))
    assert all(layer.weight.shape == (layer.num_features,) for layer in norms(shared).values())
    for layer in norms(private).values():
        assert layer.weight is None
        assert [weight.numel() for weight in layer.weights] == list(layer.channels_of_sets)
        assert len(layer.weights) == len(layer.biases) == len(WIDTHS)
    for index, width in enumerate(WIDTHS):
        ordinary = private.skeleton(width)
        for name, layer in norms(private).items():
            assert layer.channels_of_sets[index] == ordinary.get_submodule(name).num_features
    private.zero_grad()
    private(batch().images, 0.5).sum().backward()
    for layer in norms(private).values():
        assert [weight.grad is not None for weight in layer.weights] == [False, True, False]


@pytest.mark.parametrize("widths", [(), (0.5, 1.0), (1.0, 0.5, 0.5)])
def test_s_net_whose_widths_do_not_fall_is_refused(widths):
    with pytest.raises(UserError, match="from the largest to the smallest, each once"):
        SNet(widths=widths)


@pytest.mark.parametrize("widths", [(1.5, 1.0), (1.0, 0.0)])
def test_s_net_with_a_width_that_is_none_is_refused(widths):
    with pytest.raises(UserError, match="A width lies above 0 and is at most 1"):
        SNet(widths=widths)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("width", [0.35, 0.5, 1.0])
def test_i_net_allocates_its_own_width_and_trains_it_on_the_labels(version, width):
    recipe = INet(network=MobileNet(version=version, full=0.25, divisor=4), width=width)
    net = build(recipe)
    ordinary = net.skeleton(width)
    assert {name: p.shape for name, p in net.named_parameters()} == {
        name: p.shape for name, p in ordinary.named_parameters()
    }
    assert recipe.parameters_at(net, Width(width)) == sum(p.numel() for p in net.parameters())
    losses = train(recipe, net, Draw(0, 0, 0, 0), at())
    expected = cross_entropy(net(batch().images, width), batch().labels).item()
    assert losses == {str(Width(width)): [pytest.approx(expected)]}
    assert recipe.tracked() == recipe.points() == (Width(width),)


@pytest.mark.parametrize("width", [0.0, 1.2])
def test_i_net_of_no_width_is_refused(width):
    with pytest.raises(UserError, match="A width lies above 0 and is at most 1"):
        INet(width=width)


def logits(number: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(number, CLASSES, dtype=torch.float64, generator=generator)


def test_soft_cross_entropy_against_certain_labels_is_cross_entropy():
    labels = torch.tensor([0, 4, 2, 2])
    certain = one_hot(labels, CLASSES).double()
    expected = cross_entropy(logits(4, 0), labels)
    torch.testing.assert_close(soft_cross_entropy(logits(4, 0), certain).double(), expected, atol=1e-6, rtol=1e-6)


def test_soft_cross_entropy_is_kl_divergence_plus_the_teacher_s_entropy():
    teacher = soft_labels(logits(6, 1)).double()
    entropy = -(teacher * teacher.log()).sum(dim=1).mean()
    divergence = kl_div(logits(6, 2).log_softmax(dim=1), teacher, reduction="batchmean")
    got = soft_cross_entropy(logits(6, 2), teacher).double()
    torch.testing.assert_close(got, divergence + entropy, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(got, cross_entropy(logits(6, 2), teacher), atol=1e-6, rtol=1e-6)


def test_soft_labels_are_probabilities_without_a_graph():
    answers = logits(3, 0).requires_grad_()
    soft = soft_labels(answers)
    assert not soft.requires_grad
    torch.testing.assert_close(soft.double(), answers.detach().softmax(dim=1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_single_precision_from_coarse_logits(coarse):
    """Autocast leaves bf16 logits; their exponentials are taken in fp32."""
    answers, teacher = logits(4, 0).to(coarse), soft_labels(logits(4, 1).to(coarse))
    assert teacher.dtype == torch.float32
    got = soft_cross_entropy(answers, teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, cross_entropy(answers.float(), teacher))


@pytest.mark.parametrize("hard", [0.0, 0.3, 1.0])
def test_mixed_loss_weighs_labels_and_teacher(hard):
    answers, labels, teacher = logits(4, 0), torch.tensor([1, 0, 3, 3]), soft_labels(logits(4, 1)).double()
    got = mixed_cross_entropy(answers, labels, teacher, hard=hard, smoothing=0.1)
    labelled = cross_entropy(answers, labels, label_smoothing=0.1)
    expected = hard * labelled + (1 - hard) * cross_entropy(answers, teacher)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)
