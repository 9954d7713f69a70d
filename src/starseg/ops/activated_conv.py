"""Convolution, bias and activation in one kernel of oneDNN, for forward passes without gradients on a CPU.

In a pass of its own, the activation takes about a tenth of the time of an EfficientNet. PyTorch has the kernel for its
compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Activation = tuple[str, list[float]]
"""Name and parameters of an activation in oneDNN."""
_KERNELS: dict[type[nn.Module], Activation] = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
}
_X86 = ("AVX2", "AVX512")


def find_activation(layer: nn.Module, x: Tensor, dtype: torch.dtype) -> Activation | None:
    """Return the activation of a layer if :func:`convolve_activated` can apply it now; None if not.

    Args:
        layer: the layer.
        x: input or output of the convolution before it.
        dtype: data type in which that is computed.
    """
    possible = (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() in _X86
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
        and not torch.compiler.is_compiling()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )
    return _KERNELS.get(type(layer)) if possible else None


def convolve_activated(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """Convolve x [N, C, H, W] as a layer does, but with another weight and bias, and apply an activation."""
    assert not isinstance(conv.padding, str) and conv.padding_mode == "zeros"
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups, *activation, ""
    )
