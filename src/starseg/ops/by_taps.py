"""Weight gradient of a convolution as one matrix product per tap, over only the pixels that the tap reads.

In channels_last, oneDNN's kernel can be slower than a matrix product and also multiplies the padding, which is most of
a dilated tap's work on a small map.

Shape letters: N images, C and O channels in and out, H W pixels in, h w pixels out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ByTapsConv2d(torch.autograd.Function):
    """Convolution whose weight gradient is computed as one matrix product per tap."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Tensor:
        """Convolve, and keep what the gradients need."""
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and weight, given that of the output [N, O, h, w]."""
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.geometry
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = torch.ops.aten.convolution_backward(
                grad_output, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [True, False, False]
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = weight_grad(grad_output, x, weight, *ctx.geometry)
        return grad_input, grad_weight, None, None, None, None


def weight_grad(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Return the weight gradient [O, C, *, *] of a convolution, given that of its output [N, O, h, w] and its input."""
    grad_output, x = grad_output.movedim(1, -1), x.movedim(1, -1)
    found = torch.zeros_like(weight.movedim(1, -1), memory_format=torch.contiguous_format)
    taps = [
        [
            _valid_range(grad_output.shape[1 + a], x.shape[1 + a], i * dilation[a] - padding[a], stride[a])
            for i in range(found.shape[1 + a])
        ]
        for a in (0, 1)
    ]
    for i, (out_rows, in_rows) in enumerate(taps[0]):
        for j, (out_columns, in_columns) in enumerate(taps[1]):
            there = grad_output[:, out_rows, out_columns].reshape(-1, grad_output.shape[-1])
            here = x[:, in_rows, in_columns].reshape(-1, x.shape[-1])
            found[:, i, j] = there.T @ here
    return found.movedim(-1, 1)


def _valid_range(outputs: int, inputs: int, offset: int, stride: int) -> tuple[slice, slice]:
    """Return the range of outputs o along an axis at which a tap reads inside the input, and the input range it reads.

    At output o, the tap reads the input at stride * o + offset.
    """
    first, last = max(0, -(offset // stride)), min(outputs - 1, (inputs - 1 - offset) // stride)
    if first > last:
        return slice(0, 0), slice(0, 0)
    return slice(first, last + 1), slice(stride * first + offset, stride * last + offset + 1, stride)
