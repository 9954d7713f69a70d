"""The machine of a benchmark: its name, capabilities, and the speed of its matrix products and convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.bench.timing import alternate, bench_device
from starseg.utils.precision import is_bf16_fast

# Shapes of a ResNet-101 at 512 px with output stride 16: one matrix product (2048 x 2304 x 256 on a CPU) and the
# corresponding 3x3 convolution. On a GPU, two images would measure little but the time of a launch.
_SIDE, _CHANNELS, _IMAGES = 32, 256, {"cpu": 2, "cuda": 256}
SPEED_COLUMNS = ("GFLOP/s", "machine's convolution", "machine's matrix product", "of its convolution")
SPEED_TITLE = "operations of convolutions, those with padding included"
_CAPABILITIES = ("avx2", "avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "sve", "bf16")


def bench_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the data types that are benchmarked: float32, and bf16 where the device is fast at it."""
    return (torch.float32, torch.bfloat16) if is_bf16_fast(device) else (torch.float32,)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a data type, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's model as the kernel names it, or "unknown CPU" outside Linux."""
    if not cpuinfo.is_file():
        return "unknown CPU"
    rows = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    return next((value.strip() for key, _, value in rows if key.strip() == "model name"), "unknown CPU")


def capabilities() -> list[str]:
    """Return the CPU's capabilities that concern the speed of matrix products."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in _CAPABILITIES if known.get(name)]


def machine_speed(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> dict[str, float]:
    """Measure a matrix product and a 3x3 convolution in channels_last.

    Returns:
        {"matrix", "convolution"} in GFLOP/s (a multiplication and an addition are two).
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    images_at_once = _IMAGES[device.type]
    rows, columns = images_at_once * _SIDE * _SIDE, 9 * _CHANNELS
    left, right = draw(rows, columns), draw(columns, _CHANNELS)
    images = draw(images_at_once, _CHANNELS, _SIDE, _SIDE).contiguous(memory_format=torch.channels_last)
    weight = draw(_CHANNELS, _CHANNELS, 3, 3).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = alternate([lambda: left @ right, lambda: F.conv2d(images, weight, padding=1)], repeats)
    work = 2e-9 * rows * columns * _CHANNELS
    return {"matrix": work / seconds[0], "convolution": work / seconds[1]}


def describe_machine(repeats: int = 5) -> dict[str, Any]:
    """Describe and measure the machine.

    Returns:
        {"cpu", "capabilities", "threads", "device", "torch", "dtype": what `auto` chooses, "speed": {dtype: see
        :func:`machine_speed`}}.
    """
    device = bench_device()
    dtypes = bench_dtypes(device)
    return {
        "cpu": cpu_model(),
        "capabilities": capabilities(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "dtype": dtype_name(dtypes[-1]),
        "speed": {dtype_name(dtype): machine_speed(device, dtype, repeats) for dtype in dtypes},
    }


def beside_machine(flops: int, seconds: float, dtype: torch.dtype) -> dict[str, float]:
    """Return the speed of a call beside that of the machine, which is measured now because it changes with its load.

    Returns:
        {"gflops": of the call, "machine_matrix", "machine_convolution": see :func:`machine_speed`, "of_convolution":
        the ratio of the first and the last}.
    """
    speed, reached = machine_speed(bench_device(), dtype), 1e-9 * flops / seconds
    return {
        "gflops": reached,
        "machine_matrix": speed["matrix"],
        "machine_convolution": speed["convolution"],
        "of_convolution": reached / speed["convolution"],
    }


def speed_cells(found: dict[str, float]) -> tuple[str, str, str, str]:
    """Format the result of :func:`beside_machine` for the columns :data:`SPEED_COLUMNS`."""
    keys = ("gflops", "machine_convolution", "machine_matrix")
    return (*(f"{found[key]:.0f}" for key in keys), f"{found['of_convolution']:.2f} x")  # type: ignore[return-value]
