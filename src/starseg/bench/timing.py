"""Time and memory of the calls that `starseg bench` compares."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def bench_device() -> torch.device:
    """Return the device that is benchmarked: a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def alternate(
    paths: list[Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = False,
) -> list[float]:
    """Return the median seconds of each call, alternating, after one warm-up call of each unless ``warm``."""
    seconds: list[list[float]] = [[] for _ in paths]
    for _ in range(repeats + (not warm)):
        for path, times in zip(paths, seconds, strict=True):
            start = clock()
            path()
            _wait()
            times.append(clock() - start)
    return [statistics.median(times[-repeats:]) for times in seconds]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_flops(path: Callable[[], Any]) -> int:
    """Return the floating-point operations of a call's matrix products and convolutions, padding included."""
    with FlopCounterMode(display=False) as counter:
        path()
    return int(counter.get_total_flops())


def peak_bytes(path: Callable[[], Any]) -> int:
    """Return the peak memory of a call in bytes on the benchmarked device, above what was allocated before it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        path()
        return torch.cuda.max_memory_allocated() - before
    # Said once by the profiler's library on a machine without a GPU, along with every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        path()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def beside_dense(seconds: float, dense_seconds: float, peaks: list[int]) -> dict[str, float]:
    """Return times and peak bytes of starseg and the dense reference, with the ratios dense / starseg."""
    return {
        "speedup": dense_seconds / seconds,
        "memory_ratio": peaks[1] / peaks[0],
        "seconds": seconds,
        "dense_seconds": dense_seconds,
        "bytes": peaks[0],
        "dense_bytes": peaks[1],
    }


def mega(size: float) -> str:
    """Format bytes as megabytes."""
    return f"{size / 1e6:.1f}"
