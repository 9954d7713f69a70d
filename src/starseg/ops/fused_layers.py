"""Convolutions fused with batch norm: the results of PyTorch's layers up to rounding, in less time and memory.

- A frozen batch norm with scale s and shift t is folded into the preceding convolution:
  conv(x, w) s + t = conv(x, s w) + t. This saves writing, reading and storing a feature map. Gradients flow through
  s w to w.
- On a CPU, gradients are computed as in :mod:`starseg.ops.by_taps` and :mod:`starseg.ops.depthwise` where that was
  measured to be faster (:data:`BY_TAPS`, :data:`DEPTHWISE`).

Shape letters: N images, C channels, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from timm import layers
from torch import Tensor, nn
from torch.autograd.graph import Node

from starseg.ops import by_taps, depthwise
from starseg.ops.activated_conv import Activation, convolve_activated, find_activation
from starseg.ops.convolution import ConvolutionWith, Geometry, Gradients

# The matrix product of a tap has in_channels columns; if there are few, copying costs more than the product saves.
_FEWEST_CHANNELS, _MOST_TAPS = 32, 9


class Faster(NamedTuple):
    """For which convolutions the gradients of this package are faster than oneDNN's.

    Attributes:
        plain: those without stride and dilation.
        strided: those with a stride and no dilation.
        dilated: those with a dilation.
    """

    plain: bool
    strided: bool
    dilated: bool


BY_TAPS = {
    ("AVX2", torch.float32): Faster(plain=True, strided=True, dilated=True),
    ("AVX512", torch.float32): Faster(plain=False, strided=True, dilated=True),
    ("AVX512_BF16", torch.bfloat16): Faster(plain=False, strided=False, dilated=True),
}
"""Where weight gradients are computed by taps, as measured by CPU capability and data type
(benchmarks/weight_gradients.py); other CPUs use oneDNN's kernel."""

DEPTHWISE = {
    ("AVX2", torch.float32): Faster(plain=False, strided=False, dilated=True),
    ("AVX512", torch.float32): Faster(plain=False, strided=False, dilated=True),
    ("AVX512_BF16", torch.bfloat16): Faster(plain=True, strided=True, dilated=True),
}
"""The same for the gradients of depthwise convolutions (the same script)."""


class _Memo:
    """A value computed from tensors, which is computed again after one of them has changed.

    Copies of a layer start without the value. PyTorch does not count an update of running statistics in training as a
    change of theirs, but it counts one of the number of batches.
    """

    def __init__(self) -> None:
        self._state: tuple[object, ...] = ()
        self._value: Any = None

    def get(self, tensors: Iterable[Tensor | None], compute: Callable[[], Any], *choices: object) -> Any:
        """Return the value for these tensors and choices. Tensors of inference mode cannot be used in training."""
        values = ((t.data_ptr(), t.device, t.dtype, t._version) for t in tensors if t is not None)
        state = (torch.is_inference_mode_enabled(), *choices, *values)
        if state != self._state:
            with torch.no_grad():
                self._state, self._value = state, compute()
        return self._value

    def __reduce__(self) -> tuple[type[_Memo], tuple[()]]:
        return _Memo, ()


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that returns its input unchanged if the preceding convolution has already applied it."""

    fused = False
    _memo: _Memo | None = None

    @property
    def constant(self) -> bool:
        """Whether the layer is a fixed scale and shift: statistics and parameters are frozen, or nothing is trained.

        False during an export to ONNX, where fusing is left to the exported graph.
        """
        learns = torch.is_grad_enabled() and (self.weight.requires_grad or self.bias.requires_grad)
        return not (self.training or learns or torch.onnx.is_in_onnx_export())

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that scale and shift depend on."""
        return self.weight, self.bias, self.running_mean, self.running_var, self.num_batches_tracked

    def affine_map(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift, [C] each.

        While the layer is constant they are computed once: on a GPU, launching these five kernels for every layer takes
        longer than the layer.
        """
        if not self.constant or torch.compiler.is_compiling() or self.weight.is_inference():
            return self._affine_map()
        self._memo = self._memo or _Memo()
        return self._memo.get(self.tensors, self._affine_map)

    def _affine_map(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None and self.running_var is not None
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, H, W], or return it unchanged if the preceding convolution has done so."""
        return x if self.fused and self.constant else super().forward(x)


class BatchNormAct2d(BatchNorm2d, layers.BatchNormAct2d):
    """The same for timm's batch norm with an activation, as in EfficientNet and MobileNet."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [N, C, H, W] unless the preceding convolution has done so, and apply the activation."""
        if self.fused and self.constant:
            return x if self.activation(x, x.dtype) else self.act(self.drop(x))
        return layers.BatchNormAct2d.forward(self, x)

    def activation(self, x: Tensor, dtype: torch.dtype) -> Activation | None:
        """Return the activation if the preceding convolution applies it as well; arguments as `find_activation` has."""
        applied = self.fused and self.constant and isinstance(self.drop, nn.Identity)
        return find_activation(self.act, x, dtype) if applied else None


class Conv2d(nn.Conv2d):
    """Convolution that also applies the following batch norm as long as that is constant.

    Attributes:
        norm: the batch norm, in a tuple that hides it from ``modules()``; empty if there is none.
    """

    norm: tuple[BatchNorm2d, ...] = ()
    _memo: _Memo | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x [N, C, H, W] and apply the fused batch norm."""
        dtype = _compute_dtype(x)
        weight, bias = self._fused(dtype)
        if bias is not None and (activation := self._activation(x, dtype)):
            return convolve_activated(self, x.to(dtype), weight.to(dtype), bias.to(dtype), activation)
        if (faster := _faster_gradients(self, x, bias)) is not None:
            assert not isinstance(self.padding, str)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
            return ConvolutionWith.apply(x, weight, bias, Geometry(self.stride, self.padding, self.dilation), faster)
        return self._conv_forward(x, weight, bias)

    def _fused(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias with the fused batch norm, which are computed once unless they are trained."""
        norm = next((norm for norm in self.norm if norm.constant), None)
        if norm is None:
            return self.weight, self.bias
        own = (self.weight, self.bias)
        if (
            (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in own))
            or torch.compiler.is_compiling()
            or self.weight.is_inference()
        ):
            self._memo = None
            return self._fuse(norm)
        self._memo = self._memo or _Memo()
        return self._memo.get((*own, *norm.tensors), lambda: [part.to(dtype) for part in self._fuse(norm)], dtype)

    def _fuse(self, norm: BatchNorm2d) -> tuple[Tensor, Tensor]:
        scale, shift = norm.affine_map()
        bias = shift if self.bias is None else self.bias * scale + shift
        return self.weight * scale[:, None, None, None], bias

    def _activation(self, x: Tensor, dtype: torch.dtype) -> Activation | None:
        """Return the activation that is applied in the same kernel; None if it is applied afterwards."""
        norms = [norm for norm in self.norm if isinstance(norm, BatchNormAct2d)]
        return norms[0].activation(x, dtype) if norms else None


class Conv2dSame(Conv2d):
    """The same for timm's convolution with TensorFlow's padding, which depends on the size of the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve x [N, C, H, W], and apply the fused batch norm."""
        sides, strides, dilations = list(self.kernel_size), list(self.stride), list(self.dilation)
        return super().forward(layers.pad_same(x, sides, strides, dilations))


OWN_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    layers.Conv2dSame: Conv2dSame,
    nn.BatchNorm2d: BatchNorm2d,
    layers.BatchNormAct2d: BatchNormAct2d,
}
"""The layers of this module that replace those of PyTorch and timm."""


def _faster_gradients(conv: Conv2d, x: Tensor, bias: Tensor | None) -> Gradients | None:
    """Return how the gradients of a convolution are computed faster than by PyTorch; None if there is no such way."""
    possible = (
        torch.is_grad_enabled()
        and conv.weight.requires_grad
        and not (bias is not None and bias.requires_grad)
        and x.device.type == "cpu"
        and (torch.is_autocast_enabled("cpu") or x.dtype == conv.weight.dtype)
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.weight[0, 0].numel() > 1
    )
    if not possible:
        return None
    if depthwise.is_depthwise(conv):
        return depthwise.GRADIENTS if _is_faster(DEPTHWISE, conv, _compute_dtype(x)) else None
    narrow = conv.in_channels < _FEWEST_CHANNELS or conv.weight[0, 0].numel() > _MOST_TAPS
    if conv.groups > 1 or narrow or not _is_faster(BY_TAPS, conv, _compute_dtype(x)):
        return None
    return by_taps.GRADIENTS


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Return the data type in which a convolution of x is computed."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _is_faster(measured: dict[tuple[str, torch.dtype], Faster], conv: Conv2d, dtype: torch.dtype) -> bool:
    # Tests compare gradients in float64, which is treated like float32.
    dtype = torch.float32 if dtype == torch.float64 else dtype
    if (faster := measured.get((cpu_capability(dtype), dtype))) is None:
        return False
    if max(conv.dilation) > 1:
        return faster.dilated
    return faster.strided if max(conv.stride) > 1 else faster.plain


def cpu_capability(dtype: torch.dtype) -> str:
    """Return the instruction set with which this CPU computes in a data type, as named in :data:`BY_TAPS`."""
    if dtype == torch.float32:
        return torch.backends.cpu.get_cpu_capability()
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    names = [name for name in ("amx_bf16", "avx512_bf16") if known.get(name)] if dtype == torch.bfloat16 else []
    return names[0].upper() if names else "none"


def fuse_batch_norm(network: nn.Module, *inputs: Any) -> None:
    """Replace the convolutions and batch norms of a network by those of this module.

    A batch norm is fused with the preceding convolution if nothing else reads the convolution's output, as determined
    from the autograd graph of one small forward pass.

    Args:
        network: module that returns a map or a list of maps.
        inputs: arguments of the small forward pass.
    """
    for module in network.modules():
        own = OWN_LAYERS.get(type(module))
        if own is not None and not (isinstance(module, nn.BatchNorm2d) and _is_bare(module)):
            module.__class__ = own
        if isinstance(module, Conv2d):
            module.norm = ()
        elif isinstance(module, BatchNorm2d):
            module.fused = False
    if not any(isinstance(module, BatchNorm2d) for module in network.modules()):
        return
    for conv, norm in _pairs(network, inputs):
        conv.norm, norm.fused = (norm,), True


def _is_bare(norm: nn.BatchNorm2d) -> bool:
    """Return whether a batch norm has no parameters or keeps no statistics."""
    return not (norm.affine and norm.track_running_stats)


def _pairs(network: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Conv2d, BatchNorm2d]]:
    """Return each convolution whose output is read by a batch norm only, with that batch norm."""
    convs: dict[Node, Conv2d] = {}
    norms: list[tuple[Node | None, BatchNorm2d]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, Conv2d) and output.grad_fn is not None:
            convs[output.grad_fn] = module
        elif isinstance(module, BatchNorm2d):
            norms.append((inputs[0].grad_fn, module))

    modes = {module: module.training for module in network.modules()}
    hooks = [m.register_forward_hook(note) for m in modes if isinstance(m, (Conv2d, BatchNorm2d))]
    with torch.enable_grad():
        found = network.eval()(*_with_gradient(inputs))
    for hook in hooks:
        hook.remove()
    for module, training in modes.items():
        module.training = training
    readers = _readers([found] if isinstance(found, Tensor) else found)
    return [(convs[node], norm) for node, norm in norms if node in convs and readers[node] == 1]


def _with_gradient(value: Any) -> Any:
    """Make tensors, also in lists and tuples, require gradients, so that the graph includes frozen layers."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return type(value)(map(_with_gradient, value)) if type(value) in (list, tuple) else value


def _readers(outputs: Iterable[Tensor]) -> Counter[Node]:
    """Count how often the result of each node of a graph is read; being an output counts."""
    readers: Counter[Node] = Counter()
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        readers[node] += 1
        if readers[node] == 1:
            nodes += [before for before, _ in node.next_functions if before is not None]
    return readers
