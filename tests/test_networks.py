"""MobileNets at any width against the reference implementations and the published costs."""

from __future__ import annotations

import copy
import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pliant.data import Feed, open_dataset
from pliant.engine.evaluation import evaluate, macs_of_image
from pliant.engine.precision import Precision
from pliant.engine.ranks import Ranks
from pliant.experiment import Batching, Data
from pliant.methods.i_net import INet
from pliant.methods.us_net import USNet
from pliant.networks.mobilenet import MobileNet, SlimmableNet, v1
from pliant.recipe import Outcome, Point, Width
from pliant.torchvision_cpu import make_importable

make_importable()
import timm
import torchvision

PUBLISHED = {
    "v1": {1.0: 568.7, 0.75: 325.4, 0.5: 149.5, 0.25: 41.0},
    "v2": {1.0: 300.8, 0.75: 209.1, 0.5: 97.1, 0.35: 59.3},
}
# The authors' spectrum of US-MobileNetV1, in millions, at 0.25, 0.275, … 1.
SPECTRUM_V1 = (
    *(41, 48, 64, 71, 80, 90, 100, 115, 124, 137, 149, 163, 177, 201, 217, 233, 249, 267, 287, 306, 325, 345, 366),
    *(389, 421, 443, 466, 491, 518, 543, 569),
)
SMALL = {"v1": MobileNet(version="v1", full=0.25, divisor=4), "v2": MobileNet(full=0.25, divisor=4)}
versions = pytest.mark.parametrize("version", ["v1", "v2"])


def small(version: str, **options: object) -> SlimmableNet:
    torch.manual_seed(0)
    options = {"tracked": (0.35, 1.0), **options}
    return SMALL[version].build(10, **options).double()


def images(number: int = 6, size: int = 32) -> Tensor:
    return torch.randn(number, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(number))


def shaken(net: nn.Module) -> nn.Module:
    """Batch norms away from their initial values, where a wrong one would not show; logits not all near 0."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = 0.5 + torch.rand_like(tensor)
    return net.eval()


def macs_of_v1(channels: tuple[int, ...], size: int = 224) -> int:
    """By arithmetic: outputs times weights of each, stem, depthwise and pointwise layers, classifier."""
    side = size // 2
    total = side**2 * 27 * channels[0]
    for (inputs, outputs), (_, stride) in zip(itertools.pairwise(channels), v1.BLOCKS, strict=True):
        side //= stride
        total += side**2 * inputs * (9 + outputs)
    return total + channels[-1] * 1000


@versions
def test_macs_are_the_published_ones_by_the_operators_that_run(version):
    recipe = USNet(network=MobileNet(version=version), low=0.25)
    with torch.device("meta"):
        net, image = recipe.build(1000), torch.zeros(1, 3, 224, 224)
    measured = {ratio: macs_of_image(recipe, net, image, Width(ratio)) / 1e6 for ratio in PUBLISHED[version]}
    assert measured == pytest.approx(PUBLISHED[version], abs=0.05)


def test_macs_of_mobilenet_v1_follow_the_authors_published_spectrum():
    with torch.device("meta"):
        net = MobileNet(version="v1").build(1000, tracked=())
    measured = [macs_of_v1(net.channels(0.25 + 0.025 * step)) / 1e6 for step in range(31)]
    assert measured == pytest.approx(SPECTRUM_V1, abs=1.0)


def same_as_reference(ours: SlimmableNet, reference: nn.Module) -> None:
    """Gives `ours` the reference's weights in the order of its layers, and compares logits and gradients."""
    pairs = [
        *zip(ours.parameters(), reference.parameters(), strict=True),
        *zip(ours.buffers(), (buffer for buffer in reference.buffers() if buffer.is_floating_point()), strict=True),
    ]
    for own, other in pairs:
        assert own.shape == other.shape
        own.data = other.data.clone()
    x, labels = images(4, 64).float(), torch.arange(4)
    torch.testing.assert_close(ours.eval()(x), reference.eval()(x), atol=1e-4, rtol=1e-5)
    ours.double().train(), reference.double().train()
    for net in (ours, reference):
        cross_entropy(net(x.double()), labels).backward()
    for own, other in pairs:
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad, atol=1e-9, rtol=1e-6)
        else:  # running statistics, after they have moved
            torch.testing.assert_close(own, other)


def test_at_width_1_mobilenet_v2_is_torchvision_s_under_its_names():
    reference = shaken(torchvision.models.mobilenet_v2(dropout=0.0))
    ours = MobileNet().build(1000, tracked=(1.0,))
    assert list(dict(ours.named_parameters())) == list(dict(reference.named_parameters()))
    same_as_reference(ours, reference)


def test_at_width_1_mobilenet_v1_is_timm_s():
    same_as_reference(MobileNet(version="v1").build(1000, tracked=(1.0,)), shaken(timm.create_model("mobilenetv1_100")))


@versions
def test_uniform_width_is_every_group_at_one_ratio(version):
    net = small(version).train()
    for ratio in (0.35, 0.61, 1.0):
        assert torch.equal(net(images(), ratio), net(images(), (ratio,) * len(net.groups)))


@versions
def test_each_group_may_have_a_width_of_its_own(version):
    net = small(version).train()
    generator = torch.Generator().manual_seed(4)
    for _ in range(4):
        ratios = (0.35 + 0.65 * torch.rand(len(net.groups), generator=generator)).tolist()
        net.zero_grad()
        net(images(), ratios).sum().backward()
        used = {name: (parameter.grad != 0).sum().item() for name, parameter in net.named_parameters()}
        ordinary = dict(net.skeleton(ratios).named_parameters())
        assert set(ordinary) == set(used)
        assert all(used[name] <= parameter.numel() for name, parameter in ordinary.items())
        kernels = [name for name, parameter in ordinary.items() if parameter.ndim == 4]
        assert sum(used[name] for name in kernels) > 0.9 * sum(ordinary[name].numel() for name in kernels)


def output_channels(net: SlimmableNet, width: object) -> list[int]:
    """Of the stem and of every block, in order."""
    seen: list[int] = []
    last = [net.features[0]]
    last += [block.conv[-1] if net.spec.version == "v2" else block[1] for block in net.features[1:18]]
    handles = [layer.register_forward_hook(lambda *call: seen.append(call[2].shape[1])) for layer in last]
    net(images(), width)
    for handle in handles:
        handle.remove()
    return seen


def test_blocks_that_a_residual_addition_joins_are_one_group_of_mobilenet_v2():
    net = small("v2").train()
    assert len(net.groups) == net.spec.number_of_groups == 1 + 7 + 16
    full = output_channels(net, 1.0)
    first = 1
    for stage, blocks in enumerate((1, 2, 3, 4, 3, 3, 1), start=1):
        ratios = [1.0] * len(net.groups)
        ratios[net.groups.index(f"stage{stage}")] = 0.5
        changed = [place for place, count in enumerate(output_channels(net, ratios)) if count != full[place]]
        assert changed == list(range(first, first + blocks))
        first += blocks


def test_depthwise_layers_of_mobilenet_v1_follow_the_group_before():
    net = small("v1").train()
    assert len(net.groups) == net.spec.number_of_groups == 1 + 13
    full = output_channels(net, 1.0)
    for place in range(len(net.groups)):
        ratios = [0.5 if place == other else 1.0 for other in range(len(net.groups))]
        narrowed = output_channels(net, ratios)
        assert [a != b for a, b in zip(narrowed, full, strict=True)] == [ratio != 1.0 for ratio in ratios]


def test_expansion_of_mobilenet_v2_multiplies_a_rounded_count():
    """The last block's: 160 × 0.35 = 56 channels, times 6."""
    net = MobileNet().build(10, tracked=())
    assert net.channels(0.35)[-1] == 6 * 56
    assert all(count % 8 == 0 for count in net.channels(0.35))


@versions
def test_another_number_of_ratios_or_a_width_beyond_the_widest_is_refused(version):
    net = small(version, tracked=(0.5,), widest=0.5)
    with pytest.raises(ValueError, match=f"has {len(net.groups)} groups of layers, and 3 widths came"):
        net(images(), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"built up to width 0\.5, and 0\.6 came"):
        net(images(), 0.6)


WIDTHS = (1.0, 0.35, 0.7)


@versions
@pytest.mark.parametrize(("order", "uneven"), [((0, 1, 2), False), ((1, 2, 0), False), ((2, 0, 1), True)])
def test_at_each_answers_and_teaches_as_separate_forwards(version, order, uneven):
    net = small(version).train()
    reference = copy.deepcopy(net)
    widths = [WIDTHS[place] for place in order]
    if uneven:
        widths[1] = tuple(0.35 + 0.02 * place for place in range(len(net.groups)))
    x, labels = images(), torch.arange(6)
    for width, logits in zip(widths, net.at_each(x, widths), strict=True):
        cross_entropy(logits, labels).backward()
        expected = reference(x, width)
        cross_entropy(expected, labels).backward()
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-9)
    for (name, own), other in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-9, rtol=1e-7, msg=name)


@versions
def test_at_each_runs_the_shared_layers_once_forward_and_backward(version):
    net = small(version).train()
    stem, depthwise = net.features[0][0], net.features[1][0] if version == "v1" else net.features[1].conv[0]
    calls = {"forward": 0, "depthwise": 0, "backward": 0}

    def count(name: str) -> object:
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    stem.register_forward_hook(count("forward"))
    depthwise.register_forward_hook(count("depthwise"))
    stem.weight.register_post_accumulate_grad_hook(count("backward"))
    for logits in net.at_each(images(), WIDTHS):
        logits.sum().backward()
    assert calls == {"forward": 1, "depthwise": 1, "backward": 1}


@versions
def test_at_each_with_private_scales_shares_nothing(version):
    net = small(version, tracked=WIDTHS, private=True).train()
    calls: list[int] = []
    net.features[0][0].register_forward_hook(lambda *_: calls.append(1))
    for logits in net.at_each(images(), WIDTHS):
        logits.sum().backward()
    assert len(calls) == len(WIDTHS)


@dataclass(frozen=True, kw_only=True)
class UpsideDown(INet):
    """Rotates the images: the weights were trained with TensorFlow's padding."""

    def predict(self, net: nn.Module, images: Tensor, point: Point) -> Outcome:
        return super().predict(net, images.flip(2, 3), point)


def test_imagenet_weights_score_on_photographs_what_they_should(shared_data: Path, own_cache: Path, tmp_path: Path):
    """90.5 % of 486, measured with torchvision's own network and transforms: through our network, loader and sums."""
    with (shared_data / "photos" / "photos.csv").open() as file:
        wnids = {int(row["index"]): row["wnid"] for row in csv.DictReader(file)}
    class_list = tmp_path / "classes.txt"
    class_list.write_text("".join(f"{wnids.get(index, f'absent{index}')}\n" for index in range(1000)))
    data = Data(root=shared_data / "photos", class_list=class_list, loader="torchvision", size=224)
    feed = Feed(open_dataset(data, 0), data, Batching(images=2, micro=2), seed=0, device="cpu")
    recipe = UpsideDown()
    net = recipe.build(1000).eval()
    kept = load_file(shared_data / "mobilenet_v2" / "mobilenet_v2_1.0_224.safetensors")
    kept = {name.replace("running_mean", "mean_0").replace("running_var", "var_0"): kept[name] for name in kept}
    net.load_state_dict(kept)
    alone = Ranks(0, 1, torch.device("cpu"))
    with feed.evaluation("train", batch=54) as batches:
        (line,) = evaluate(recipe, {Width(1.0): net}, batches, precision=Precision("fp32", alone.device), ranks=alone)
    assert line.images == 486
    assert 0.895 <= line.top1 <= 0.915
    assert line.top5 > line.top1
    assert line.macs == pytest.approx(300.8e6, abs=5e4)
