"""Weight gradient of a convolution as one matrix product per tap, over only the pixels that the tap reads.

In channels_last, oneDNN's kernel can be slower than a matrix product and also multiplies the padding, which is most of
a dilated tap's work on a small map.

Shape letters: N images, C and O channels in and out, H W pixels in, h w pixels out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from starseg.ops.convolution import Geometry, Gradients, onednn_grad


def weight_grad(grad_output: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the weight gradient [O, C, *, *] of a convolution, given that of its output [N, O, h, w] and its input."""
    stride, padding, dilation = geometry
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


GRADIENTS = Gradients(partial(onednn_grad, of_weight=False), weight_grad)
"""oneDNN's gradient of the input, and that of the weight as products per tap."""
