"""Gradients of depthwise convolutions on a CPU, computed by the kernels that oneDNN is fast at.

Depthwise convolutions are most of the layers of MobileNets and EfficientNets. oneDNN computes their output fast, but
for many shapes falls back to kernels for their gradients that take 10 to 100 times as long. The same numbers, up to
rounding, come from fast kernels:

- The gradient of the input is a convolution of the output's gradient with the flipped kernel. With stride s, each of
  the s x s interleaved parts of the input reads every s-th tap only, and is a convolution without stride of its own.
- The gradient of the weights is fast for kernels of at most 3 x 3 taps without dilation. A larger kernel is divided
  into such blocks of taps, and with dilation d, the d x d interleaved parts of the maps are taken one after the other.

Shape letters: N images, C channels, H W pixels in, h w pixels out, k l taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from starseg.ops.convolution import Geometry, Gradients, onednn_grad

_BLOCK = 3


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is one whose gradients can be computed here. Its padding is a pair of numbers."""
    if not conv.groups == conv.in_channels == conv.out_channels or conv.groups == 1:
        return False
    assert not isinstance(conv.padding, str)
    geometry = zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
    padded_by_kernel = all(p <= d * (k - 1) for k, p, d in geometry)
    return padded_by_kernel and (max(conv.stride) == 1 or max(conv.dilation) == 1)


def input_grad(grad_output: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient [N, C, H, W] of the input x, given that of the output [N, C, h, w].

    Output pixel o reads input pixel i with tap t where i + padding = stride o + dilation t.
    """
    stride, padding, dilation = geometry
    if max(stride) == 1:
        rest = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        return F.conv2d(grad_output, weight.flip(2, 3), None, 1, rest, dilation, len(weight))
    found = torch.zeros_like(x)
    for i in range(stride[0]):
        for j in range(stride[1]):
            part = found[:, :, i :: stride[0], j :: stride[1]]
            starts = [(a + p) % s for a, p, s in zip((i, j), padding, stride, strict=True)]
            taps = weight[:, :, starts[0] :: stride[0], starts[1] :: stride[1]].flip(2, 3)
            if 0 in taps.shape or 0 in part.shape:
                continue
            edges: list[int] = []
            for a in (1, 0):
                before = taps.shape[2 + a] - 1 - ((i, j)[a] + padding[a]) // stride[a]
                read = part.shape[2 + a] + taps.shape[2 + a] - 1
                edges += [before, read - before - grad_output.shape[2 + a]]
            part.copy_(F.conv2d(F.pad(grad_output, edges), taps, None, groups=len(weight)))
    return found


def weight_grad(grad_output: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient [C, 1, k, l] of the weights, given that of the output [N, C, h, w] and the input x."""
    stride, padding, dilation = geometry
    if max(weight.shape[2:]) <= _BLOCK and max(dilation) == 1:
        return onednn_grad(grad_output, x, weight, geometry, of_weight=True)
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    found = torch.zeros(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    for i in range(dilation[0]):
        for j in range(dilation[1]):
            grads, pixels = (m[:, :, i :: dilation[0], j :: dilation[1]] for m in (grad_output, x))
            if 0 not in grads.shape:
                found += _by_blocks(grads, pixels, weight, stride)
    return found.to(weight.dtype)


def _by_blocks(grad_output: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the weight gradient [C, 1, k, l] of a convolution without padding and dilation, block by block of taps."""
    geometry = Geometry(stride, (0, 0), (1, 1))
    found = torch.empty(weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    lengths = [s * (n - 1) for s, n in zip(stride, grad_output.shape[2:], strict=True)]
    layout = torch.channels_last
    grad_output = grad_output.contiguous(memory_format=layout)
    for i in _starts(weight.shape[2]):
        for j in _starts(weight.shape[3]):
            block = weight[:, :, i : i + _BLOCK, j : j + _BLOCK]
            rows, columns = (slice(a, a + n + k) for a, n, k in zip((i, j), lengths, block.shape[2:], strict=True))
            seen = x[:, :, rows, columns].contiguous(memory_format=layout)
            found[:, :, i : i + _BLOCK, j : j + _BLOCK] = onednn_grad(
                grad_output, seen, block, geometry, of_weight=True
            )
    return found


def _starts(size: int) -> list[int]:
    """Return the first taps of the blocks that cover a side of the kernel; the last two may overlap."""
    return sorted({max(0, min(start, size - _BLOCK)) for start in range(0, size, _BLOCK)})


GRADIENTS = Gradients(input_grad, weight_grad)
"""Both gradients of a depthwise convolution."""
