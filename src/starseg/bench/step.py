"""Benchmark of a whole training step, compared with the dense reference.

Both have ResNet-101, the same weights and the same uint8 images in memory: reading files is the section "data". A step
runs from the images to the changed weights.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from starseg.bench.machine import SPEED_COLUMNS, SPEED_TITLE, beside_machine, speed_cells
from starseg.bench.reference import DenseStep
from starseg.bench.run import Case, LossPath
from starseg.bench.timing import alternate, bench_device, beside_dense, count_flops, mega, peak_bytes
from starseg.config import TrainConfig
from starseg.engine.fit import StepTraining
from starseg.engine.launch import make_fabric
from starseg.models import Architecture, make_network
from starseg.utils.clock import Clock
from starseg.utils.precision import is_bf16_fast

BACKBONE = "resnet101"
PARTS = ("data", "old forward", "new forward", "loss", "backward", "optimizer")
_NETWORKS = ("old forward", "new forward", "backward")


class StepPath:
    """Training step of STAR on random images, in both implementations."""

    def __init__(self, case: Case, backbone: str = BACKBONE, precision: Any = "32", compiled: bool = False) -> None:
        path = LossPath(case)
        config = TrainConfig(precision=precision, compile=compiled, warmup=0.0, batch_size=case.batch)
        fabric = make_fabric(config)
        old = make_network(Architecture(backbone), [case.old]).requires_grad_(False).eval()
        model = copy.deepcopy(old).requires_grad_(True)
        model.add_head(case.new)
        self.generator = torch.Generator(fabric.device).manual_seed(0)
        ctx = replace(
            path.ctx, model=model.to(fabric.device), old_model=old.to(fabric.device), generator=self.generator
        )
        path.method.ctx, path.method.bank = ctx, path.bank.to(fabric.device)
        path.method.freeze(ctx)
        images = torch.randint(0, 256, (case.batch, 3, case.crop, case.crop), dtype=torch.uint8)
        self.raw = replace(path.batch, images=images, labels=path.batch.labels.cpu())
        self.dense_step = DenseStep(path.method, ctx, path.plan)
        ctx.model.train()
        self.training = StepTraining(fabric, path.method, ctx, 1000, 1e-6, config, Clock(fabric.device))

    def lean(self) -> Tensor:
        """Run a step as training does and return the loss."""
        self.generator.manual_seed(0)
        return torch.stack(list(self.training.iterate(self.raw).values())).sum()

    def dense(self) -> Tensor:
        """Run a step with the dense reference and return the loss."""
        self.generator.manual_seed(0)
        return self.dense_step(self.raw)


def measure_step(case: Case, repeats: int, backbone: str = BACKBONE) -> dict[str, Any]:
    """Measure time and memory of a step in both implementations, and the parts of starseg's.

    Raises:
        RuntimeError: they differ in their loss.
    """
    path = StepPath(case, backbone)
    lean, dense = path.lean(), path.dense()
    if not torch.isclose(lean, dense, rtol=1e-3):
        raise RuntimeError(f"{case}: loss {lean.item()}, densely {dense.item()}")
    half = StepPath(case, backbone, "bf16-mixed") if is_bf16_fast(bench_device()) else None
    if half:
        half.lean()
    before = dict(path.training.clock.read())
    # All of them take turns, so that the load of the machine changes their times alike.
    calls = [path.lean, path.dense, *([half.lean] if half else [])]
    seconds, dense_seconds, *bf16 = alternate(calls, repeats, warm=True)
    split = {part: (path.training.clock.read()[part] - before[part]) / repeats for part in PARTS}
    peaks, flops = [peak_bytes(path.lean), peak_bytes(path.dense)], count_flops(path.dense)
    found: dict[str, Any] = {
        **beside_dense(seconds, dense_seconds, peaks),
        "split": split,
        "networks_share": sum(split[part] for part in _NETWORKS) / sum(split.values()),
        "speed": {"float32": beside_machine(flops, seconds, torch.float32)},
    }
    if bf16:
        found |= {"bf16_seconds": bf16[0], "bf16_speedup": dense_seconds / bf16[0]}
        found["speed"]["bfloat16"] = beside_machine(flops, bf16[0], torch.bfloat16)
    return found


def bf16_slowdown() -> float:
    """Measure the time of a convolution in bf16 relative to float32."""
    device, seconds = bench_device(), []
    for dtype in (torch.float32, torch.bfloat16):
        images, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in ((2, 64, 32, 32), (64, 64, 3, 3)))
        images = images.contiguous(memory_format=torch.channels_last)
        call: Callable[[], Tensor] = lambda x=images, w=weight: F.conv2d(x, w, padding=1)  # type: ignore[misc] # noqa: E731
        seconds.append(alternate([call], 5)[0])
    return seconds[1] / seconds[0]


def bench_step(console: Console, case: Case, repeats: int, backbone: str = BACKBONE) -> dict[str, Any]:
    """Measure and print the section "step": {"voc_15-1": {...}}, see :func:`measure_step`."""
    start = time.perf_counter()
    f = measure_step(case, repeats, backbone)
    table = Table(
        "training step", "seconds", "share", title=f"{backbone}, VOC 15-1 step 1, batch {case.batch}, float32"
    )
    total = sum(f["split"].values())
    for part, seconds in f["split"].items():
        table.add_row(part, f"{seconds:.3f}", f"{100 * seconds / total:.1f} %")
    table.add_section()
    table.add_row("step", f"{f['seconds']:.3f}", f"{f['speedup']:.2f} x faster")
    table.add_row("densely", f"{f['dense_seconds']:.3f}")
    table.add_row("MB", mega(f["bytes"]), f"{f['memory_ratio']:.2f} x less")
    table.add_row("densely", mega(f["dense_bytes"]))
    if "bf16_seconds" in f:
        table.add_row("bf16", f"{f['bf16_seconds']:.3f}", f"{f['bf16_speedup']:.2f} x faster")
    console.print(table)
    speeds = Table("step", *SPEED_COLUMNS, title=SPEED_TITLE)
    for dtype, speed in f["speed"].items():
        speeds.add_row(dtype, *speed_cells(speed))
    console.print(speeds)
    if "bf16_seconds" not in f:
        console.print(
            f"bf16 is left out: a convolution takes {bf16_slowdown():.1f} x as long as in float32 here", soft_wrap=True
        )
    console.print(f"measured in {time.perf_counter() - start:.0f} s", highlight=False)
    return {"voc_15-1": f}
