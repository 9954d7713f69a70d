"""Measure where starseg's gradients of convolutions are faster than oneDNN's (`BY_TAPS` and `DEPTHWISE` in
starseg/ops/fused_layers.py).

Usage: OMP_NUM_THREADS=1 python benchmarks/weight_gradients.py

The convolutions are those of a ResNet-101 with ASPP at 512 px, and the depthwise ones of an EfficientNet-Lite0 at
192 px. Run it on an idle machine; each time is the least of seven. ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
makes the CPU behave as one without AVX-512.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from starseg.ops import by_taps, depthwise
from starseg.ops.convolution import Geometry, Gradient, Gradients, onednn_grad
from starseg.ops.fused_layers import cpu_capability
from starseg.utils.precision import is_bf16_fast

# Channels in and out, side of the map, stride, dilation.
CASES = (
    (64, 64, 128, 1, 1),
    (128, 128, 64, 1, 1),
    (256, 256, 32, 1, 1),
    (128, 128, 128, 2, 1),
    (256, 256, 64, 2, 1),
    (512, 512, 32, 1, 2),
    (2048, 256, 32, 1, 6),
    (2048, 256, 32, 1, 12),
    (2048, 256, 32, 1, 18),
)
# Channels, side of the map, side of the kernel, stride, dilation.
DEPTHWISE_CASES = (
    (32, 96, 3, 1, 1),
    (96, 96, 3, 2, 1),
    (144, 48, 5, 2, 1),
    (240, 24, 5, 1, 1),
    (240, 24, 3, 2, 1),
    (672, 12, 5, 1, 1),
    (1152, 12, 5, 1, 2),
    (1152, 12, 3, 1, 2),
)
REPEATS = 7


def least(call: Callable[[], object]) -> float:
    """Return the least milliseconds of a call."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds[1:])


def draw(images: int, channels: int, pixels: int, dtype: torch.dtype) -> Tensor:
    """Return random maps in channels_last."""
    maps = torch.randn(images, channels, pixels, pixels).to(dtype)
    return maps.contiguous(memory_format=torch.channels_last)


def faster(gradient: Gradient, of_weight: bool, slope: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> str:
    """Return the milliseconds of oneDNN and of a gradient of this package, and their ratio."""
    a = least(lambda: onednn_grad(slope, x, weight, geometry, of_weight))
    b = least(lambda: gradient(slope, x, weight, geometry))
    return f"{a:.1f} / {b:.1f} = {a / b:.2f}"


def measure_taps(dtype: torch.dtype) -> None:
    """Print the times of the weight gradients of convolutions."""
    print(f"{cpu_capability(dtype)}, {dtype}: milliseconds for 2 images, oneDNN / by taps = times faster")
    for inputs, outputs, side, stride, dilation in CASES:
        x, slope = draw(2, inputs, side, dtype), draw(2, outputs, side // stride, dtype)
        weight = torch.randn(outputs, inputs, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
        geometry = Geometry((stride, stride), (dilation, dilation), (dilation, dilation))
        shape = f"{inputs} -> {outputs}, {side} x {side}, stride {stride}, dilation {dilation}"
        print(f"{shape}: {faster(by_taps.weight_grad, True, slope, x, weight, geometry)}", flush=True)


def measure_depthwise(dtype: torch.dtype) -> None:
    """Print the times of both gradients of depthwise convolutions."""
    print(f"{cpu_capability(dtype)}, {dtype}, depthwise: milliseconds for 16 images, oneDNN / starseg = times faster")
    for channels, side, kernel, stride, dilation in DEPTHWISE_CASES:
        x, slope = draw(16, channels, side, dtype), draw(16, channels, side // stride, dtype)
        weight, padding = torch.randn(channels, 1, kernel, kernel).to(dtype), dilation * (kernel - 1) // 2
        maps = slope, x, weight, Geometry((stride, stride), (padding, padding), (dilation, dilation))
        shape = f"{channels}, {side} x {side}, {kernel} x {kernel}, stride {stride}, dilation {dilation}"
        cells = [
            f"{name} {faster(gradient, name == 'weight', *maps)}"
            for name, gradient in zip(Gradients._fields, depthwise.GRADIENTS, strict=True)
        ]
        print(f"{shape}: {', '.join(cells)}", flush=True)


def main() -> None:
    fast = is_bf16_fast(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16) if fast else (torch.float32,):
        measure_taps(dtype)
        measure_depthwise(dtype)


if __name__ == "__main__":
    main()
