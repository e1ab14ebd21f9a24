"""Residual networks against torchvision's, published accuracies and costs; and skipping in all its forms."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pliant.data.sources.cifar10 import open_cifar10
from pliant.errors import UserError
from pliant.methods.depth import load_backbone
from pliant.networks.execution import folded, runner
from pliant.networks.gates import make_gates, open_at_start
from pliant.networks.resnet import ResidualNet, ResNet, cost
from pliant.torchvision_cpu import make_importable

make_importable()
from torchvision import models


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_form_is_torchvision_s(depth: int) -> None:
    """The same names, so that its weights load; the same logits."""
    torch.manual_seed(0)
    theirs = models.get_model(f"resnet{depth}", num_classes=7).eval()
    ours = ResNet(form="imagenet", depth=depth).build(7).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [34, 101])
def test_weights_of_deeper_ones_have_torchvision_s_names_and_shapes(depth: int) -> None:
    with torch.device("meta"):
        theirs = models.get_model(f"resnet{depth}", num_classes=7).state_dict()
        ours = ResNet(form="imagenet", depth=depth).build(7).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize(
    ("spec", "side", "millions"),
    [
        (ResNet(depth=8), 32, 12.24),
        (ResNet(depth=32), 32, 68.86),
        (ResNet(depth=38), 32, 83.02),
        (ResNet(depth=110), 32, 252.89),
        (ResNet(depth=38, shortcut="conv"), 32, 83.28),
        (ResNet(form="imagenet", depth=18), 224, 1814),
        (ResNet(form="imagenet", depth=34), 224, 3664),
        (ResNet(form="imagenet", depth=50), 224, 4089),
        (ResNet(form="imagenet", depth=101), 224, 7801),
    ],
)
def test_cost_is_the_published_one(spec: ResNet, side: int, millions: float) -> None:
    classes = 10 if spec.form == "cifar" else 1000
    assert cost(spec.build(classes), side).total / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "side"),
    [
        (ResNet(depth=20, shortcut="conv"), 32),
        (ResNet(form="imagenet", depth=50), 64),
        (ResNet(form="imagenet", depth=50), 75),
        (ResNet(form="imagenet", depth=10), 112),
        (ResNet(depth=14, shortcut="conv"), 31),
    ],
)
def test_cost_is_what_runs(spec: ResNet, side: int) -> None:
    """Block by block: closed ones are not counted by torch's own counter either."""
    net = spec.build(10).eval()
    expected = cost(net, side)
    for closed in range(spec.number_of_blocks):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(
                torch.zeros(1, 3, side, side),
                lambda number, x, closed=closed: torch.tensor([float(number != closed)]),
                runner("grouped", "inside"),
            )
        assert counter.get_total_flops() // 2 == expected.total - expected.residual[closed]


def test_blocks_of_resnet_101_are_33() -> None:
    """The paper's [3, 4, 20, 3] is a slip."""
    assert ResNet(form="imagenet", depth=101).blocks_of_groups == (3, 4, 23, 3)
    assert ResNet(form="imagenet", depth=101).number_of_blocks == 33


@pytest.mark.parametrize("form", ["cifar", "imagenet"])
def test_depth_that_does_not_exist_is_refused(form: str) -> None:
    with pytest.raises(ValueError, match="33"):
        ResNet(form=form, depth=33).check()


def accuracy(net: ResidualNet, root: Path) -> float:
    """Top-1 on all 10,000 test images, normalised as the weights' source did."""
    _, test = open_cifar10(root)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    labels = torch.from_numpy(test.labels)
    right = 0
    with torch.no_grad():
        for first in range(0, len(labels), 500):
            pixels = torch.from_numpy(test.images[first : first + 500]).permute(0, 3, 1, 2).float() / 255
            images = ((pixels - mean) / std).to(memory_format=torch.channels_last)
            right += (net(images).argmax(1) == labels[first : first + 500]).sum().item()
    return right / len(labels)


@pytest.mark.parametrize(
    ("depth", "top1"),
    [
        pytest.param(20, 0.9173, marks=pytest.mark.soak),
        (32, 0.9263),
        pytest.param(44, 0.9310, marks=pytest.mark.soak),
        pytest.param(56, 0.9339, marks=pytest.mark.soak),
    ],
)
def test_pretrained_networks_score_what_their_source_says(
    shared_data: Path, cifar10: Path, depth: int, top1: float
) -> None:
    net = ResNet(depth=depth).build(10).eval().to(memory_format=torch.channels_last)
    load_backbone(net, shared_data / "resnet_cifar10" / f"resnet{depth}.safetensors")
    assert accuracy(net, cifar10) == pytest.approx(top1, abs=5e-5)


def test_weights_of_another_depth_are_refused(shared_data: Path) -> None:
    path = shared_data / "resnet_cifar10" / "resnet32.safetensors"
    with pytest.raises(UserError, match=r"layer1.3.bn1.bias is \(16,\) there and missing in a ResNet-20"):
        load_backbone(ResNet(depth=20).build(10), path)
    classes = (
        r"fc.bias is \(10,\) there and \(7,\) in a ResNet-32 with 7 classes. Write the --data.source, or --data.cl"
    )
    with pytest.raises(UserError, match=classes):
        load_backbone(ResNet(depth=32).build(7), path)
    with pytest.raises(UserError, match=r"Write the --recipe.network.shortcut it was trained with"):
        load_backbone(ResNet(depth=32, shortcut="conv").build(10), path)
    with pytest.raises(UserError, match="No weights can be read"):
        load_backbone(ResNet(depth=32).build(10), path.with_name("missing"))


def lively(spec: ResNet, classes: int = 10) -> ResidualNet:
    """In evaluation mode, with batch norms that have seen something."""
    torch.manual_seed(0)
    net = spec.build(classes)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.3, 1.0)
                module.bias.normal_(0, 0.2)
    return net.eval()


SPECS = [
    ResNet(depth=14, shortcut="pad"),
    ResNet(depth=14, shortcut="pool"),
    ResNet(depth=14, shortcut="conv"),
    ResNet(form="imagenet", depth=18),
    ResNet(form="imagenet", depth=50),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.form}{spec.depth}{spec.shortcut}")
@pytest.mark.parametrize("closed", ["inside", "around"])
@pytest.mark.parametrize("layout", ["folded", "plain"])
def test_grouped_and_single_answer_as_masked(spec: ResNet, closed: str, layout: str) -> None:
    net = lively(spec)
    images = torch.randn(6, 3, 64, 64)
    gates = (torch.rand(6, spec.number_of_blocks, generator=torch.Generator().manual_seed(3)) < 0.6).float()
    gates[0], gates[1] = 0.0, 1.0

    def decide(rows: slice) -> object:
        return lambda number, x: gates[rows, number]

    with torch.no_grad():
        want = net(images, decide(slice(None)), runner("masked", closed))
        one = folded(net) if layout == "folded" else net
        one = one.to(memory_format=torch.channels_last)
        batch = images.to(memory_format=torch.channels_last)
        got = one(batch.clone(), decide(slice(None)), runner("grouped", closed))
        single = torch.cat(
            [one(batch[i : i + 1], decide(slice(i, i + 1)), runner("grouped", closed)) for i in range(len(images))]
        )
    for answer in (got, single):
        torch.testing.assert_close(answer, want, atol=1e-4 * want.abs().max().item(), rtol=1e-4)


def test_closed_blocks_leave_the_shortcut() -> None:
    """SkipNet and BlockDrop leave it as it is, URNet passes it through the block's ReLU."""
    net = lively(ResNet(depth=8, shortcut="conv"))
    block = list(net.blocks())[1]
    x = torch.randn(2, 16, 8, 8)
    shut = torch.zeros(2)
    around = runner("masked", "around")(block, x, shut)
    assert torch.equal(around, block.shortcut(x))
    assert (around < 0).any()
    assert torch.equal(runner("masked", "inside")(block, x, shut), block.shortcut(x).relu())
    half = torch.full((2,), 0.5)
    torch.testing.assert_close(
        runner("masked", "around")(block, x, half),
        0.5 * (block.shortcut(x) + block.residual(x)).relu() + 0.5 * block.shortcut(x),
    )
    torch.testing.assert_close(
        runner("masked", "inside")(block, x, half), (block.shortcut(x) + 0.5 * block.residual(x)).relu()
    )


@pytest.mark.parametrize(("kind", "share"), [("ff1", 0.156), ("ff2", 0.125), ("rnn", 0.0002), ("pooled", 3.4e-6)])
def test_gates_cost_what_they_run(kind: str, share: float) -> None:
    """And the shares of a block that the notes computed: 15.6 %, 12.5 %, 0.02 to 0.03 %."""
    backbone = ResNet(depth=38).build(10)
    gates = make_gates(kind, backbone, first=1).eval()
    macs = gates.macs(backbone, 32)
    assert macs[0] == 0
    assert macs[3] / cost(backbone, 32).residual[3] == pytest.approx(share, rel=0.05)
    ask = gates.begin(torch.zeros(1, 3, 32, 32), None)
    x = torch.zeros(1, 16, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ask(1, x)
        ask(2, x)
    counted = counter.get_total_flops() // 2
    assert counted == pytest.approx(macs[1] + macs[2], rel=0.01)


@pytest.mark.parametrize("kind", ["ff1", "ff2", "rnn", "pooled"])
@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_gates_open_at_the_wanted_rate_at_the_start(kind: str, rate: float) -> None:
    torch.manual_seed(0)
    backbone = ResNet(depth=14).build(10)
    gates = make_gates(kind, backbone, first=1)
    open_at_start(gates, rate)
    ask = gates.begin(torch.zeros(8, 3, 32, 32), None)
    x = torch.randn(8, 16, 32, 32).relu()
    assert ask(1, x).sigmoid().mean().item() == pytest.approx(rate, abs=0.05)


def test_recurrent_gate_remembers_within_a_forward_alone() -> None:
    torch.manual_seed(0)
    backbone = ResNet(depth=14).build(10)
    gates = make_gates("rnn", backbone, first=1)
    x = torch.randn(4, 16, 8, 8)

    def answers() -> list[Tensor]:
        ask = gates.begin(torch.zeros(4, 3, 32, 32), None)
        return [ask(1, x), ask(2, x)]

    one, again = answers(), answers()
    assert torch.equal(one[1], again[1]), "state begins anew"
    fresh = gates.begin(torch.zeros(4, 3, 32, 32), None)
    assert not torch.equal(fresh(2, x), one[1]), "and runs along the depth"


def test_folding_leaves_the_network_alone() -> None:
    net = lively(ResNet(depth=8, shortcut="conv"))
    before = copy.deepcopy(net.state_dict())
    folded(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
