"""Measure where the weight gradient by taps is faster than oneDNN's (`BY_TAPS` in starseg/ops/fused_layers.py).

Usage: OMP_NUM_THREADS=1 python benchmarks/weight_gradients.py

The convolutions are those of a ResNet-101 with ASPP at 512 px. Run it on an idle machine; each time is the
least of seven.
"""

import time
from collections.abc import Callable

import torch

from starseg.ops.fused_layers import _weight_grad, cpu_capability
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
REPEATS = 7


def least(call: Callable[[], object]) -> float:
    """Return the least milliseconds of a call."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds[1:])


def main() -> None:
    fast = is_bf16_fast(torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16) if fast else (torch.float32,):
        print(f"{cpu_capability(dtype)}, {dtype}: milliseconds for 2 images, oneDNN / by taps = times faster")
        for inputs, outputs, side, stride, dilation in CASES:

            def draw(channels: int, pixels: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                maps = torch.randn(2, channels, pixels, pixels).to(dtype)
                return maps.contiguous(memory_format=torch.channels_last)

            x, slope = draw(inputs, side), draw(outputs, side // stride)
            weight = torch.randn(outputs, inputs, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
            geometry = (stride, stride), (dilation, dilation), (dilation, dilation)

            def onednn(x=x, slope=slope, weight=weight, geometry=geometry) -> object:  # type: ignore[no-untyped-def]
                return torch.ops.aten.convolution_backward(
                    slope, x, weight, None, *geometry, False, [0, 0], 1, [False, True, False]
                )

            def taps(x=x, slope=slope, weight=weight, geometry=geometry) -> object:  # type: ignore[no-untyped-def]
                return _weight_grad(slope, x, weight, *geometry)

            a, b = least(onednn), least(taps)
            shape = f"{inputs} -> {outputs}, {side} x {side}, stride {stride}, dilation {dilation}"
            print(f"{shape}: {a:.1f} / {b:.1f} = {a / b:.2f}")


if __name__ == "__main__":
    main()
