"""`starseg bench`: what training and evaluation cost, beside the same written densely, in one process.

Here the loss path: the networks' outputs are random tensors; measured is everything between them and their gradients.
Times are medians of interleaved repetitions, memory is the peak above what the inputs take.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from starseg.bench.dense import dense_base, dense_later
from starseg.data.samples import Batch
from starseg.methods import StepContext
from starseg.methods.star import Star, StarOptions
from starseg.models import Output, Segmenter
from starseg.models.decoders import FEATURES
from starseg.replay.bank import PrototypeBank
from starseg.replay.plan import ReplayPlan
from starseg.tasks import IGNORE, TaskSequence

_STRIDE, _REPLAYED = 16, 5
_FEW, _MANY = 10, 150


@dataclass(frozen=True)
class Case:
    """Shapes of a training step: classes known and new, images of a batch, side of a crop; "voc" or "ade"."""

    old: int
    new: int
    batch: int
    crop: int
    dataset: str


def loss_cases(crop: int) -> dict[str, Case]:
    """The steps whose loss path is measured."""
    return {
        "voc_15-1": Case(15, 1, 8, crop, "voc"),
        "ade_100-10": Case(100, 10, 4, crop, "ade"),
        "ade_base": Case(0, 100, 4, crop, "ade"),
    }


class _NoNetwork:
    """What a method asks of the network itself."""

    output_stride = _STRIDE
    mean = torch.zeros(1)


class LossPath:
    """Random outputs of the networks in a step of STAR, and its loss with gradients from them in both ways."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        options = Star.complete_options(StarOptions(), Star.recipes[case.dataset])
        self.method = Star(StarOptions(**options))
        known, cells = case.old, case.crop // _STRIDE
        self.batch = Batch(torch.zeros(0), _labels(case), torch.arange(case.batch))
        replayed = _REPLAYED * known
        self.output = _output(case.batch, known + case.new, cells, replayed)
        self.previous = _output(case.batch, known, cells, 0) if known else None
        self.leaves = [t.requires_grad_() for t in self.output if isinstance(t, Tensor)]
        self.ctx = self.method.ctx = _context(case)
        prototypes = torch.nn.functional.normalize(torch.randn(known, FEATURES), dim=1)
        norms = torch.ones(known)
        self.bank = PrototypeBank(torch.ones(1 + known), prototypes, prototypes.abs(), norms, norms)
        self.plan = ReplayPlan(torch.full((known,), _REPLAYED), 1.0, 0.5, torch.ones(1 + known))
        self.method.bank, self.method.plan = self.bank, self.plan

    def lean(self) -> Tensor:
        """As training does it."""
        old = self.previous
        losses = self.method.losses(self.batch, lambda *_: self.output, (lambda *_: old) if old else None)
        return self._backward(torch.stack(list(losses.values())).sum())

    def dense(self) -> Tensor:
        """As it is written down."""
        ctx, options = self.ctx, self.method.options
        if self.previous is None:
            return self._backward(dense_base(ctx, options, self.batch, self.output))
        self.bank.draw(self.plan.rows, ctx.generator, options.norm_noise)
        return self._backward(dense_later(ctx, options, self.batch, self.output, self.previous, self.bank, self.plan))

    def _backward(self, loss: Tensor) -> Tensor:
        self.forget()
        loss.backward()
        return loss.detach()

    def forget(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def _labels(case: Case) -> Tensor:
    """Patches of 32 pixels: background, new classes, and some ignored ones."""
    ids = torch.tensor([0, IGNORE, *range(case.old + 1, case.old + case.new + 1)], dtype=torch.uint8)
    side = case.crop // 32
    patches = torch.where(
        torch.rand(case.batch, side, side) < 0.5, 0, torch.randint(len(ids), (case.batch, side, side))
    )
    return ids[patches].repeat_interleave(32, 1).repeat_interleave(32, 2)


def _output(batch: int, classes: int, cells: int, replayed: int) -> Output:
    features = torch.rand(batch, FEATURES, cells, cells).contiguous(memory_format=torch.channels_last)
    logits = (2 * torch.randn(batch, classes, cells, cells) - 3).contiguous(memory_format=torch.channels_last)
    return Output(features, logits, torch.randn(replayed, classes) if replayed else None)


def _context(case: Case) -> StepContext:
    groups = [range(1, 1 + case.old)] * bool(case.old) + [range(1 + case.old, 1 + case.old + case.new)]
    names = tuple(map(str, range(1 + case.old + case.new)))
    task = TaskSequence("bench", tuple(map(tuple, groups)), names, "overlap")
    model = cast(Segmenter, _NoNetwork())
    generator = torch.Generator().manual_seed(0)
    return StepContext(task, len(groups) - 1, model, model, 1, _no_scan, generator)


def _no_scan(name: str) -> Iterator[Batch]:
    return iter(())


def alternate(
    paths: list[Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm: bool = False,
) -> list[float]:
    """Median seconds of each, called in turn, after one call of each that does not count, unless they are ``warm``."""
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


def peak_bytes(path: Callable[[], Any]) -> int:
    """Most memory on the CPU that a call holds at any time beyond what was there before, of all allocations."""
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


def measure_loss(case: Case, repeats: int) -> dict[str, float]:
    """Time and memory of one case in both ways.

    Raises:
        RuntimeError: they differ in their loss.
    """
    path = LossPath(case)
    lean, dense = path.lean(), path.dense()
    if not torch.isclose(lean, dense, rtol=1e-4):
        raise RuntimeError(f"{case}: loss {lean.item()}, densely {dense.item()}")
    seconds, dense_seconds = alternate([path.lean, path.dense], repeats)
    peaks = []
    for call in (path.lean, path.dense):
        path.forget()
        peaks.append(peak_bytes(call))
    return beside_dense(seconds, dense_seconds, peaks)


def beside_dense(seconds: float, dense_seconds: float, peaks: list[int]) -> dict[str, float]:
    """Times and peak bytes (ours, the dense path's) with their ratios, dense over ours."""
    return {
        "speedup": dense_seconds / seconds,
        "memory_ratio": peaks[1] / peaks[0],
        "seconds": seconds,
        "dense_seconds": dense_seconds,
        "bytes": peaks[0],
        "dense_bytes": peaks[1],
    }


def measure_growth(case: Case) -> dict[str, float]:
    """Peak memory of a later step with few and with many old classes; the growth is many over few."""
    peaks: dict[str, int] = {}
    for old in (_FEW, _MANY):
        path = LossPath(replace(case, old=old))
        for prefix, call in (("", path.lean), ("dense_", path.dense)):
            call()
            path.forget()
            peaks[f"{prefix}bytes_{old}"] = peak_bytes(call)
    return {
        **peaks,
        "growth": peaks[f"bytes_{_MANY}"] / peaks[f"bytes_{_FEW}"],
        "dense_growth": peaks[f"dense_bytes_{_MANY}"] / peaks[f"dense_bytes_{_FEW}"],
    }


def bench(console: Console, quick: bool = False) -> dict[str, Any]:
    """Measure and print tables.

    Args:
        console: takes the tables.
        quick: crops of 128 pixels, a tiny network and a single repetition: whether it runs, not how fast.

    Returns:
        {"loss": {case: {"speedup", "memory_ratio", "seconds", "dense_seconds", "bytes", "dense_bytes"}},
        "memory_growth": {"growth", "dense_growth", and the "bytes" behind them}, "step": see
        :func:`starseg.bench.step.measure_step`, "data": see :func:`starseg.bench.data.data_section`, "eval": see
        :func:`starseg.bench.evaluation.measure_eval`}; ratios are dense over ours.
    """
    from starseg.bench.data import data_section
    from starseg.bench.evaluation import bench_eval
    from starseg.bench.step import BACKBONE, bench_step

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
    f = found["memory_growth"] = measure_growth(Case(_FEW, 10, 4, crop, "ade"))
    grown = Table("10 new classes", f"MB, {_FEW} old", f"MB, {_MANY} old", "growth")
    for name, prefix in (("starseg", ""), ("densely", "dense_")):
        peaks = (mega(f[f"{prefix}bytes_{n}"]) for n in (_FEW, _MANY))
        grown.add_row(name, *peaks, f"{f[f'{prefix}growth']:.2f} x")
    console.print(grown)
    found["data"] = data_section(console, quick)
    backbone = "test_resnet" if quick else BACKBONE
    found["step"] = bench_step(console, Case(15, 1, 4, crop, "voc"), 1 if quick else 3, backbone)
    found["eval"] = bench_eval(console, crop, 4, 1 if quick else 3, backbone)
    return found


def _machine() -> str:
    return f"CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def mega(size: float) -> str:
    """Bytes as megabytes."""
    return f"{size / 1e6:.1f}"
