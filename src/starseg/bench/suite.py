"""All benchmarks of `starseg bench`, with their tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from starseg.bench.data import data_section
from starseg.bench.evaluation import bench_eval
from starseg.bench.machine import describe_machine
from starseg.bench.run import FEW_CLASSES, MANY_CLASSES, Case, loss_cases, measure_growth, measure_loss
from starseg.bench.step import BACKBONE, bench_step
from starseg.bench.timing import mega


def bench(console: Console, quick: bool = False) -> dict[str, Any]:
    """Run all benchmarks and print their tables.

    Args:
        console: takes the tables.
        quick: crops of 128 pixels, a tiny network and a single repetition: whether it runs, not how fast.

    Returns:
        {"machine": see :func:`starseg.bench.machine.describe_machine`,
        "loss": {case: {"speedup", "memory_ratio", "seconds", "dense_seconds", "bytes", "dense_bytes"}},
        "memory_growth": {"growth", "dense_growth", and the "bytes" behind them}, "step": see
        :func:`starseg.bench.step.measure_step`, "data": see :func:`starseg.bench.data.data_section`, "eval": see
        :func:`starseg.bench.evaluation.measure_eval`}; ratios are dense over ours.
    """
    crop, repeats = (128, 1) if quick else (512, 5)
    found: dict[str, Any] = {"machine": describe_machine(), "loss": {}}
    _print_machine(console, found["machine"])
    table = Table("loss path", "seconds", "densely", "faster", "MB", "densely", "less", title=f"crop {crop}")
    for name, case in loss_cases(crop).items():
        f = found["loss"][name] = measure_loss(case, repeats)
        seconds = (f"{f['seconds']:.3f}", f"{f['dense_seconds']:.3f}", f"{f['speedup']:.1f} x")
        table.add_row(name, *seconds, mega(f["bytes"]), mega(f["dense_bytes"]), f"{f['memory_ratio']:.1f} x")
    console.print(table)
    f = found["memory_growth"] = measure_growth(Case(FEW_CLASSES, 10, 4, crop, "ade"))
    grown = Table("10 new classes", f"MB, {FEW_CLASSES} old", f"MB, {MANY_CLASSES} old", "growth")
    for name, prefix in (("starseg", ""), ("densely", "dense_")):
        peaks = (mega(f[f"{prefix}bytes_{n}"]) for n in (FEW_CLASSES, MANY_CLASSES))
        grown.add_row(name, *peaks, f"{f[f'{prefix}growth']:.2f} x")
    console.print(grown)
    found["data"] = data_section(console, quick)
    backbone = "test_resnet" if quick else BACKBONE
    found["step"] = bench_step(console, Case(15, 1, 4, crop, "voc"), 1 if quick else 3, backbone)
    found["eval"] = bench_eval(console, crop, 4, 1 if quick else 3, backbone)
    return found


def _print_machine(console: Console, machine: dict[str, Any]) -> None:
    flags = ", ".join(machine["capabilities"]) or "no capability of interest"
    console.print(f"CPU: {machine['cpu']} ({flags}), {machine['threads']} thread(s)", highlight=False)
    console.print(
        f"measured on: {machine['device']}, torch {machine['torch']}; train.precision=auto would use "
        f"{machine['dtype']}",
        highlight=False,
    )
    table = Table("this machine, GFLOP/s", "matrix product", "3x3 convolution")
    for dtype, speed in machine["speed"].items():
        table.add_row(dtype, f"{speed['matrix']:.0f}", f"{speed['convolution']:.0f}")
    console.print(table)
