"""The fused layers give the outputs and gradients of torch's own layers."""

import copy

import pytest
import torch
from timm import layers
from torch import nn

from starseg.bench.reference import unfused
from starseg.models import Architecture, Segmenter, make_network
from starseg.ops import fused_layers
from starseg.ops.activated_conv import find_activation
from starseg.ops.fused_layers import BatchNorm2d, Conv2d, cpu_capability, fuse_batch_norm


@pytest.fixture(autouse=True)
def _every_gradient_by_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX2 in float32, whatever this one is."""
    monkeypatch.setattr(fused_layers, "cpu_capability", lambda dtype: "AVX2")


def network() -> Segmenter:
    """In float64, with batch norms that do something."""
    model = make_network(Architecture("test_resnet"), [3]).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2.0),
            ):
                values.uniform_(low, high)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_outputs_gradients_and_statistics(frozen: bool) -> None:
    model = network()
    if frozen:
        model.freeze_norm()
    model.decoder.project[-1].p = 0.0
    plain, images = unfused(model), torch.randn(2, 3, 64, 48).double().contiguous(memory_format=torch.channels_last)
    found = []
    for each in (model, plain):
        output = each.train()(images)
        (output.features.square().sum() + output.logits.sum()).backward()
        found.append((output.features, output.logits, {n: p.grad for n, p in each.named_parameters()}))
    for got, want in zip(*(f[:2] for f in found), strict=True):
        torch.testing.assert_close(got, want)
    gradients = found[1][2]
    for name, got in found[0][2].items():
        assert (got is None) == (gradients[name] is None), name
        if got is not None:
            assert (got - gradients[name]).abs().max() <= 1e-9 * gradients[name].abs().max(), name
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer, msg=name)
    for each in (model, plain):
        each.eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(images).logits, plain(images).logits)


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (3, 20)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 6, 6), ((1, 3), (2, 3), (0, 2), 2)]
)
def test_weight_gradient_by_taps(size: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int) -> None:
    """Taps that see nothing but padding among them."""
    conv = Conv2d(32, 5, kernel, stride, padding, dilation, bias=False).double()
    plain = copy.deepcopy(conv)
    plain.__class__ = nn.Conv2d
    image = torch.randn(2, 32, *size).double().contiguous(memory_format=torch.channels_last)
    images = [image.clone().requires_grad_() for _ in range(2)]
    outputs = [each(x) for each, x in zip((conv, plain), images, strict=True)]
    assert type(outputs[0].grad_fn) is not type(outputs[1].grad_fn)
    slope = torch.randn_like(outputs[1])
    for output in outputs:
        output.backward(slope)
    torch.testing.assert_close(conv.weight.grad, plain.weight.grad)
    torch.testing.assert_close(images[0].grad, images[1].grad)


@pytest.mark.parametrize(
    ("capability", "dtype", "by_taps"),
    [
        ("AVX2", torch.float32, (True, True, True)),
        ("AVX512", torch.float32, (False, True, True)),
        ("AVX512_BF16", torch.bfloat16, (False, False, True)),
        ("AMX_BF16", torch.bfloat16, (False, False, False)),
        ("DEFAULT", torch.float32, (False, False, False)),
    ],
)
def test_gradients_are_by_taps_where_that_is_faster(
    capability: str, dtype: torch.dtype, by_taps: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_layers, "cpu_capability", lambda dtype: capability)
    image = torch.randn(2, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    for expected, (stride, dilation) in zip(by_taps, ((1, 1), (2, 1), (1, 2)), strict=True):
        conv = Conv2d(32, 32, 3, stride, dilation, dilation, bias=False)
        images, gradients = [image.clone().requires_grad_() for _ in range(2)], []
        for x, each in zip(images, (conv, nn.Conv2d), strict=True):
            conv.weight.grad = None
            conv.__class__ = Conv2d if each is conv else nn.Conv2d
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                output = conv(x)
            assert output.dtype == dtype
            assert (each is conv and expected) == ("ConvolutionWith" in type(output.grad_fn).__name__)
            output.float().square().sum().backward()
            gradients.append(conv.weight.grad)
            assert gradients[-1].dtype == x.grad.dtype == torch.float32
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for got, want in (gradients, [x.grad for x in images]):
            assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize(
    ("known", "dtype", "name"),
    [
        ({"avx512_bf16": True}, torch.bfloat16, "AVX512_BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, "AMX_BF16"),
        ({}, torch.bfloat16, "none"),
        ({"avx512_bf16": True}, torch.float16, "none"),
    ],
)
def test_capability_of_a_cpu(
    known: dict[str, bool], dtype: torch.dtype, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert cpu_capability(dtype) == name


def test_frozen_batch_norm_stores_no_map_for_the_backward_pass() -> None:
    model = network().train()
    every = [m for m in model.modules() if isinstance(m, BatchNorm2d)]
    assert len(every) == sum(len(m.norm) for m in model.modules() if isinstance(m, Conv2d)) and every

    def kept() -> int:
        maps: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.ndim == 4 and len(tensor) == 2:
                maps[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(torch.randn(2, 3, 128, 128).double().contiguous(memory_format=torch.channels_last))
        return sum(maps.values())

    trained = kept()
    model.freeze_norm()
    assert kept() < 0.75 * trained


def test_replaced_batch_norms_are_applied() -> None:
    """Several GPUs: the runner replaces them by synchronised ones."""
    model = network().eval()
    image = torch.randn(1, 3, 64, 64).double()
    want = model(image).logits
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BatchNorm2d):
                other = nn.BatchNorm2d(child.num_features, momentum=None).double().eval()
                other.load_state_dict(child.state_dict())
                other.__class__ = type("Other", (nn.BatchNorm2d,), {})
                setattr(parent, name, other)
    model.fuse_batch_norm()
    torch.testing.assert_close(model(image).logits, want)


def test_scale_and_shift_are_computed_again_only_after_a_change() -> None:
    """By training, in place, by loading a state, or by converting the module."""
    norm = BatchNorm2d(3).eval().requires_grad_(False)

    def check(times: int) -> None:
        calls.clear()
        for _ in range(3):
            found = norm.affine_map()
            want = norm.weight / (norm.running_var + norm.eps).sqrt()
            torch.testing.assert_close(found, (want, norm.bias - norm.running_mean * want))
        assert len(calls) == times

    calls: list[None] = []
    compute = norm._affine_map
    norm._affine_map = lambda: calls.append(None) or compute()  # type: ignore[method-assign]
    check(1)
    check(0)
    norm.train()(torch.randn(2, 3, 4, 4))
    norm.eval()
    check(1)
    with torch.no_grad():
        norm.weight.mul_(2)
    check(1)
    norm.running_mean.add_(1)
    check(1)
    norm.load_state_dict(BatchNorm2d(3).state_dict())
    check(1)
    norm.double()
    check(1)
    with torch.inference_mode():
        assert norm.affine_map()[0].is_inference()
    assert not norm.affine_map()[0].is_inference()
    del norm._affine_map
    twin = copy.deepcopy(norm)
    twin.running_var.mul_(4)
    torch.testing.assert_close(twin.affine_map()[0], norm.affine_map()[0] / 2, rtol=1e-5, atol=0)


def test_fused_weights_are_computed_again_only_after_a_change() -> None:
    """Of the convolution or of its batch norm, or for another data type; training computes them every time."""
    conv, norm = Conv2d(3, 4, 3), BatchNorm2d(4)
    norm.running_var.uniform_(0.5, 2)
    network, image = nn.Sequential(conv, norm).eval(), torch.randn(1, 3, 8, 8)
    conv.norm, norm.fused = (norm,), True
    calls: list[None] = []
    compute = conv._fuse
    conv._fuse = lambda norm: calls.append(None) or compute(norm)  # type: ignore[method-assign]

    def check(times: int, dtype: torch.dtype = torch.float32) -> None:
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for _ in range(3):
                found = network(image)
        want = norm._affine_map()[0][:, None, None] * nn.functional.conv2d(image, conv.weight, conv.bias)
        want += norm._affine_map()[1][:, None, None]
        torch.testing.assert_close(found.float(), want, rtol=2e-2, atol=5e-2 if dtype == torch.bfloat16 else 1e-4)
        assert found.dtype == dtype
        assert len(calls) == times

    norm.requires_grad_(False)
    check(3)
    with torch.no_grad():
        check(1)
        check(0)
        check(1, torch.bfloat16)
        conv.weight.mul_(2)
        check(1)
        norm.bias.add_(1)
        check(1)
    conv.requires_grad_(False)
    check(0)
    del conv._fuse
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin[0].weight.mul_(0)
    torch.testing.assert_close(
        twin(image), (norm._affine_map()[1] + conv.bias * norm._affine_map()[0])[:, None, None].expand(1, 4, 6, 6)
    )


@pytest.mark.parametrize("layer", [nn.Identity, nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("half", [False, True])
def test_an_activation_is_applied_with_the_convolution_if_nothing_is_trained(
    layer: type[nn.Module], half: bool
) -> None:
    net = nn.Sequential(
        layers.Conv2dSame(4, 8, 3, stride=2, bias=False), layers.BatchNormAct2d(8, act_layer=layer, inplace=False)
    ).eval()
    net[1].weight.data.uniform_(-20, 20)
    x = torch.randn(2, 4, 9, 12).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        want = net(x)
        fuse_batch_norm(net, x)
        found = net(x)
        assert isinstance(net[1], fused_layers.BatchNormAct2d) and net[1].fused
        known = find_activation(net[1].act, x, found.dtype) is not None
    assert found.dtype == want.dtype and found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, want, atol=0.2 if half else 1e-4, rtol=2e-2 if half else 1e-4)
    assert find_activation(net[1].act, x, torch.float32) is None, "not with gradients"
    with torch.no_grad():
        assert find_activation(net[1].act, x, torch.float64) is None and find_activation(nn.SiLU(), x, x.dtype) is None
    assert known or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512") or half
