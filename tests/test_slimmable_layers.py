"""Slimmable layers against plain ones that hold the sliced weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.networks.slimmable import SlimmableBatchNorm2d, SlimmableConv2d, SlimmableLinear, active_channels

ratios = st.floats(0, 1, exclude_min=True)
few = settings(max_examples=40)


@st.composite
def layers(draw: st.DrawFn) -> tuple[int, int]:
    """Channels of a layer, and a divisor that leaves it some."""
    divisor = draw(st.integers(1, 64))
    return draw(st.integers(divisor, 2048)), divisor


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@given(layer=layers(), ratio=ratios)
def test_active_channels_are_a_multiple_of_the_divisor_or_all(layer, ratio):
    channels, divisor = layer
    active = active_channels(channels, ratio, divisor)
    assert active % divisor == 0 or active == channels
    assert 1 <= active <= channels


@given(layer=layers(), ratio=ratios)
def test_rounding_never_loses_over_a_tenth_and_adds_no_more_than_one_divisor(layer, ratio):
    channels, divisor = layer
    wanted = channels * ratio
    active = active_channels(channels, ratio, divisor)
    assert 0.9 * wanted <= active <= wanted + divisor
    if active < wanted:
        assert wanted - active <= divisor / 2


@given(layer=layers(), one=ratios, other=ratios)
def test_a_wider_width_never_has_fewer_channels(layer, one, other):
    channels, divisor = layer
    narrow, wide = sorted((one, other))
    assert active_channels(channels, narrow, divisor) <= active_channels(channels, wide, divisor)


@given(layer=layers(), excess=st.floats(1, 3))
def test_width_1_is_all_channels(layer, excess):
    channels, divisor = layer
    assert active_channels(channels, 1.0, divisor) == channels
    assert active_channels(channels, excess, divisor) == channels


@pytest.mark.parametrize(
    ("channels", "ratio", "active"),
    [(32, 0.35, 16), (24, 0.35, 8), (64, 0.35, 24), (96, 0.35, 32), (160, 0.35, 56), (16, 0.3, 8), (32, 0.05, 8)],
)
def test_channel_counts_of_the_published_narrow_networks(channels, ratio, active):
    """32 × 0.35 = 11.2 is nearest to 8, which loses over a tenth: 16. MobileNetV2 0.35 is published so."""
    assert active_channels(channels, ratio, 8) == active


@pytest.mark.parametrize(("divisor", "said"), [(33, "of at most 32"), (0, "at least 1"), (-8, "at least 1")])
def test_divisor_that_leaves_no_channel_is_refused(divisor, said):
    with pytest.raises(ValueError, match=said):
        active_channels(32, 0.5, divisor)


@few
@given(
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 12),
    kernel=st.sampled_from((1, 3, 5)),
    stride=st.integers(1, 2),
    average=st.booleans(),
)
def test_dense_convolution_is_the_plain_one_with_the_first_weights(inputs, outputs, kernel, stride, average):
    layer = SlimmableConv2d(12, 12, kernel, stride=stride, average=average).double()
    plain = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False).double()
    plain.weight.data = layer.weight.data[:outputs, :inputs].clone()
    x = noise(2, inputs, 7, 6)
    factor = 12 / inputs if average else 1.0
    torch.testing.assert_close(layer(x, outputs), plain(x) * factor)


@few
@given(active=st.integers(1, 6), per_group=st.integers(1, 3), outputs=st.integers(1, 3), stride=st.integers(1, 2))
def test_grouped_convolution_keeps_its_first_groups(active, per_group, outputs, stride):
    layer = SlimmableConv2d(6 * per_group, 6 * outputs, 3, stride=stride, groups=6).double()
    plain = nn.Conv2d(active * per_group, active * outputs, 3, stride, padding=1, groups=active, bias=False).double()
    plain.weight.data = layer.weight.data[: active * outputs].clone()
    x = noise(2, active * per_group, 5, 5)
    torch.testing.assert_close(layer(x), plain(x))


@few
@given(active=st.integers(1, 16), stride=st.integers(1, 2))
def test_depthwise_convolution_follows_its_input(active, stride):
    layer = SlimmableConv2d(16, 16, 3, stride=stride, groups=16).double()
    plain = nn.Conv2d(active, active, 3, stride, padding=1, groups=active, bias=False).double()
    plain.weight.data = layer.weight.data[:active].clone()
    x = noise(2, active, 6, 6)
    torch.testing.assert_close(layer(x), plain(x))


def test_part_of_a_group_is_refused():
    with pytest.raises(ValueError, match="3 channels are no whole number of groups of 2"):
        SlimmableConv2d(8, 8, 3, groups=4)(torch.zeros(1, 3, 5, 5))


def test_grouped_convolution_has_nothing_to_average():
    with pytest.raises(ValueError, match="nothing to average"):
        SlimmableConv2d(8, 8, 3, groups=8, average=True)(torch.zeros(1, 8, 5, 5))


@few
@given(inputs=st.integers(1, 10), outputs=st.integers(1, 6), average=st.booleans())
def test_linear_is_the_plain_one_with_the_first_weights_and_averages_the_sum_without_the_bias(inputs, outputs, average):
    layer = SlimmableLinear(10, 6, average=average).double()
    x = noise(3, inputs)
    factor = 10 / inputs if average else 1.0
    expected = x @ layer.weight[:outputs, :inputs].T * factor + layer.bias[:outputs]
    torch.testing.assert_close(layer(x, outputs), expected)


def test_without_a_count_all_outputs_are_active():
    assert SlimmableConv2d(4, 9, 1)(torch.zeros(1, 2, 3, 3)).shape == (1, 9, 3, 3)
    assert SlimmableLinear(4, 9)(torch.zeros(1, 2)).shape == (1, 9)


def test_gradient_reaches_the_active_weights_alone():
    layer = SlimmableConv2d(8, 8, 3)
    layer(torch.randn(2, 3, 5, 5), 5).sum().backward()
    touched = layer.weight.grad != 0
    assert touched[:5, :3].all()
    assert touched.sum() == 5 * 3 * 9


def make_norm(private: bool = False) -> SlimmableBatchNorm2d:
    """Twelve channels, tracked at 12, 8 and 4, with nothing at its initial value."""
    torch.manual_seed(3)
    layer = SlimmableBatchNorm2d(12, (12, 8, 4), private=private)
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = torch.rand_like(tensor) + 0.5
    return layer


def buffers_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def plain_norm(layer: SlimmableBatchNorm2d, index: int | None, channels: int, training: bool) -> nn.BatchNorm2d:
    plain = nn.BatchNorm2d(channels).train(training)
    private = layer.private and index is not None
    weight, bias = (layer.weights[index], layer.biases[index]) if private else (layer.weight, layer.bias)
    plain.weight.data, plain.bias.data = weight.data[:channels].clone(), bias.data[:channels].clone()
    if index is not None:
        plain.running_mean = getattr(layer, f"mean_{index}")[:channels].clone()
        plain.running_var = getattr(layer, f"var_{index}")[:channels].clone()
    return plain


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("index", "channels"), [(0, 12), (1, 8), (2, 4), (0, 5)])
def test_batch_norm_is_the_plain_one_on_its_set_which_alone_moves(private, training, index, channels):
    layer = make_norm(private).train(training)
    plain = plain_norm(layer, index, channels, training)
    before = buffers_of(layer)
    x = torch.randn(6, channels, 3, 3)
    torch.testing.assert_close(layer(x, index), plain(x))
    after = buffers_of(layer)
    for name, buffer in before.items():
        if training and name in (f"mean_{index}", f"var_{index}"):
            own = plain.running_mean if name.startswith("mean") else plain.running_var
            torch.testing.assert_close(after[name][:channels], own)
            assert torch.equal(after[name][channels:], buffer[channels:])
            assert not torch.equal(after[name], buffer)
        else:
            assert torch.equal(after[name], buffer)


def test_batch_norm_of_an_untracked_width_normalises_with_the_batch_and_moves_nothing():
    layer = make_norm().train()
    before = buffers_of(layer)
    x = torch.randn(6, 7, 3, 3)
    expected = F.batch_norm(x, None, None, layer.weight[:7], layer.bias[:7], training=True)
    assert torch.equal(layer(x), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_batch_norm_without_statistics_is_refused_in_evaluation():
    with pytest.raises(ValueError, match="no statistics for this width: calibrate it first"):
        make_norm().eval()(torch.zeros(2, 7, 3, 3))


def test_imposed_statistics_take_the_place_of_every_set():
    layer = make_norm().eval()
    layer.running_mean, layer.running_var = torch.full((4,), 2.0), torch.full((4,), 9.0)
    x = torch.randn(3, 4, 2, 2)
    expected = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight[:4], layer.bias[:4])
    for index in (None, 2):
        assert torch.equal(layer(x, index), expected)


def test_private_scales_belong_to_the_tracked_widths_alone():
    with pytest.raises(ValueError, match="private to the trained widths"):
        make_norm(private=True).train()(torch.randn(4, 8, 3, 3))
