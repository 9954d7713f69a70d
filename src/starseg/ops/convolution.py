"""Convolution on a CPU whose gradients are computed by given functions instead of oneDNN's kernels.

Shape letters: N images, C and O channels in and out, H W pixels in, h w pixels out, k l taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Geometry(NamedTuple):
    """Stride, zero padding and dilation of a convolution, two numbers each."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


Gradient = Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]
"""Computes a gradient from that of the output [N, O, h, w], the input x [N, C, H, W] and the weight [O, *, k, l]."""


class Gradients(NamedTuple):
    """Functions that compute the gradients of a convolution."""

    input: Gradient
    weight: Gradient


class ConvolutionWith(torch.autograd.Function):
    """Convolution of x [N, C, H, W] with a weight [O, C / groups, k, l] and a constant bias [O] or None."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, gradients: Gradients
    ) -> Tensor:
        """Convolve, and keep what the gradients need."""
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.gradients = geometry, gradients
        return F.conv2d(x, weight, bias, *geometry, x.shape[1] // weight.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and weight, given that of the output [N, O, h, w]."""
        grads = (
            compute(grad_output, *ctx.saved_tensors, ctx.geometry) if needed else None
            for compute, needed in zip(ctx.gradients, ctx.needs_input_grad, strict=False)
        )
        return *grads, None, None, None


def onednn_grad(grad_output: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, of_weight: bool) -> Tensor:
    """Return PyTorch's gradient of the weight or of the input."""
    groups = x.shape[1] // weight.shape[1]
    wanted = [not of_weight, of_weight, False]
    return torch.ops.aten.convolution_backward(grad_output, x, weight, None, *geometry, False, [0, 0], groups, wanted)[
        int(of_weight)
    ]
