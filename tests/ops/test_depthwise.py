"""Gradients of depthwise convolutions equal PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from starseg.bench.reference import unfused
from starseg.models import Architecture, make_network
from starseg.ops import fused_layers
from starseg.ops.convolution import ConvolutionWith, Geometry
from starseg.ops.depthwise import GRADIENTS, is_depthwise
from starseg.ops.fused_layers import BatchNormAct2d, Conv2d, Conv2dSame

GEOMETRIES = [
    # kernel, stride, padding, dilation
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (5, 1, 2, 1),
    (5, 2, 2, 1),
    (5, 2, 0, 1),
    (7, 1, 3, 1),
    (4, 3, 1, 1),
    (3, 1, 2, 2),
    (5, 1, 4, 2),
    (3, 1, 6, 6),
    (1, 2, 0, 1),
    ((3, 5), (2, 1), (1, 2), 1),
    ((7, 1), 1, (2, 0), (1, 3)),
]


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (13, 20)])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_gradients(size: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv2d(6, 6, kernel, stride, padding, dilation, groups=6).double()
    assert is_depthwise(conv)
    x = torch.randn(2, 6, *size).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    output = conv(x)
    slope = torch.randn_like(output)
    wanted = torch.autograd.grad(output, (x, conv.weight), slope)
    geometry = Geometry(conv.stride, conv.padding, conv.dilation)
    torch.testing.assert_close(GRADIENTS.input(slope, x, conv.weight, geometry), wanted[0])
    torch.testing.assert_close(GRADIENTS.weight(slope, x, conv.weight, geometry), wanted[1])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 12, 3, groups=6),
        nn.Conv2d(6, 6, 3, groups=3),
        nn.Conv2d(1, 1, 3),
        nn.Conv2d(6, 6, 3, padding=3, groups=6),
        nn.Conv2d(6, 6, 3, stride=2, padding=2, dilation=2, groups=6),
    ],
)
def test_other_convolutions_are_left_to_pytorch(layer: nn.Conv2d) -> None:
    """Several outputs a channel, groups of channels, one channel, padding beyond the kernel, stride with dilation."""
    assert not is_depthwise(layer)


def test_only_the_gradients_asked_for() -> None:
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3, requires_grad=True)
    ConvolutionWith.apply(x, weight, None, Geometry((1, 1), (2, 2), (2, 2)), GRADIENTS).sum().backward()
    assert x.grad is None
    wanted = torch.autograd.grad(F.conv2d(x, weight, None, 1, 2, 2, 4).sum(), weight)[0]
    torch.testing.assert_close(weight.grad, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_network_of_depthwise_convolutions(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """EfficientNet-Lite0 has every kind of layer: TensorFlow's padding, 5 x 5 taps, strides, dilation."""
    monkeypatch.setattr(fused_layers, "_is_faster", lambda measured, conv, dtype: True)
    model = make_network(Architecture("tf_efficientnet_lite0"), [3], pretrained=False).double().train(training)
    model.decoder.project[-1].p = 0.0
    plain = unfused(model)
    kinds = [{type(module) for module in network.modules()} for network in (model, plain)]
    assert {Conv2d, Conv2dSame, BatchNormAct2d} <= kinds[0]
    assert not any(kind.__module__.startswith("starseg.ops") for kind in kinds[1])
    images = torch.randn(2, 3, 32, 32).double().contiguous(memory_format=torch.channels_last)
    gradients = []
    for network in (model, plain):
        network(images).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, wanted in gradients[1].items():
        got = gradients[0][name]
        assert (got - wanted).abs().max() <= 1e-9 * max(1, wanted.abs().max()), name
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images).logits, plain.eval()(images).logits)
