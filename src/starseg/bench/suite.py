"""All benchmarks of `starseg bench`, with their tables."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from starseg.bench.data import data_section
from starseg.bench.evaluation import bench_eval
from starseg.bench.run import FEW_CLASSES, MANY_CLASSES, Case, loss_cases, measure_growth, measure_loss, mega
from starseg.bench.step import BACKBONE, bench_step


def bench(console: Console, quick: bool = False) -> dict[str, Any]:
    """Run all benchmarks and print their tables.

    Args:
        console: takes the tables.
        quick: crops of 128 pixels, a tiny network and a single repetition: whether it runs, not how fast.

    Returns:
        {"loss": {case: {"speedup", "memory_ratio", "seconds", "dense_seconds", "bytes", "dense_bytes"}},
        "memory_growth": {"growth", "dense_growth", and the "bytes" behind them}, "step": see
        :func:`starseg.bench.step.measure_step`, "data": see :func:`starseg.bench.data.data_section`, "eval": see
        :func:`starseg.bench.evaluation.measure_eval`}; ratios are dense over ours.
    """
    crop, repeats = (128, 1) if quick else (512, 5)
    table = Table(
        "loss path", "seconds", "densely", "faster", "MB", "densely", "less", title=f"crop {crop}, {_machine()}"
    )
    found: dict[str, Any] = {"loss": {}}
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


def _machine() -> str:
    return f"CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
