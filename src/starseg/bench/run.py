"""Benchmark of training and evaluation (`starseg bench`), compared with a dense reference in one process.

Here the loss path: the networks' outputs are random tensors; measured is everything between them and their gradients.
Times are medians of interleaved repetitions, memory is the peak above what the inputs take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from starseg.bench.reference import dense_base, dense_later
from starseg.bench.timing import alternate, bench_device, beside_dense, peak_bytes
from starseg.data.samples import Batch
from starseg.methods import StepContext
from starseg.methods.star import Star, StarOptions
from starseg.models import Output, Segmenter
from starseg.replay.bank import PrototypeBank
from starseg.replay.plan import ReplayPlan
from starseg.tasks import IGNORE, TaskSequence

_STRIDE, _WIDTH, _REPLAYED = 16, 256, 5
FEW_CLASSES, MANY_CLASSES = 10, 150


@dataclass(frozen=True)
class Case:
    """Shapes of a training step: old and new classes, batch size, crop size, and data set ("voc" or "ade")."""

    old: int
    new: int
    batch: int
    crop: int
    dataset: str


def loss_cases(crop: int) -> dict[str, Case]:
    """Return the steps whose loss path is measured, by name."""
    return {
        "voc_15-1": Case(15, 1, 8, crop, "voc"),
        "ade_100-10": Case(100, 10, 4, crop, "ade"),
        "ade_base": Case(0, 100, 4, crop, "ade"),
    }


class _NoNetwork:
    """Stand-in with the attributes that a method reads from the network."""

    stride = _STRIDE

    def __init__(self, device: torch.device) -> None:
        self.mean = torch.zeros(1, device=device)


class LossPath:
    """Random network outputs in a step of STAR, with its loss and gradients in both implementations.

    Args:
        case: shapes of the step.
        device: device of the outputs; by default the benchmarked device.
    """

    def __init__(self, case: Case, device: torch.device | None = None) -> None:
        device = device or bench_device()
        torch.manual_seed(0)
        options = Star.complete_options(StarOptions(), Star.recipes[case.dataset])
        self.method = Star(StarOptions(**options))
        known, cells = case.old, case.crop // _STRIDE
        self.batch = Batch(torch.zeros(0), _labels(case).to(device), torch.arange(case.batch))
        replayed = _REPLAYED * known
        self.output = _output(case.batch, known + case.new, cells, replayed, device)
        self.previous = _output(case.batch, known, cells, 0, device) if known else None
        self.leaves = [t.requires_grad_() for t in self.output if isinstance(t, Tensor)]
        self.ctx = self.method.ctx = _context(case, device)
        prototypes = torch.nn.functional.normalize(torch.randn(known, _WIDTH), dim=1)
        norms = torch.ones(known)
        bank = PrototypeBank(torch.ones(1 + known), prototypes, prototypes.abs(), norms, norms)
        self.bank = bank.to(device)
        owed = torch.full((known,), _REPLAYED, device=device)
        self.plan = ReplayPlan(owed, 1.0, 0.5, torch.ones(1 + known, device=device))
        self.method.bank, self.method.plan = self.bank, self.plan

    def lean(self) -> Tensor:
        """Compute loss and gradients as training does."""
        old = self.previous
        losses = self.method.losses(self.batch, lambda *_: self.output, (lambda *_: old) if old else None)
        return self._backward(torch.stack(list(losses.values())).sum())

    def dense(self) -> Tensor:
        """Compute loss and gradients with the dense reference."""
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
    """Draw labels in patches of 32 pixels: background, new classes, and some ignored ones."""
    ids = torch.tensor([0, IGNORE, *range(case.old + 1, case.old + case.new + 1)], dtype=torch.uint8)
    side = case.crop // 32
    patches = torch.where(
        torch.rand(case.batch, side, side) < 0.5, 0, torch.randint(len(ids), (case.batch, side, side))
    )
    return ids[patches].repeat_interleave(32, 1).repeat_interleave(32, 2)


def _output(batch: int, classes: int, cells: int, replayed: int, device: torch.device) -> Output:
    features = torch.rand(batch, _WIDTH, cells, cells).contiguous(memory_format=torch.channels_last)
    logits = (2 * torch.randn(batch, classes, cells, cells) - 3).contiguous(memory_format=torch.channels_last)
    extra = torch.randn(replayed, classes).to(device) if replayed else None
    return Output(features.to(device), logits.to(device), extra)


def _context(case: Case, device: torch.device) -> StepContext:
    groups = [range(1, 1 + case.old)] * bool(case.old) + [range(1 + case.old, 1 + case.old + case.new)]
    names = tuple(map(str, range(1 + case.old + case.new)))
    task = TaskSequence("bench", tuple(map(tuple, groups)), names, "overlap")
    model = cast(Segmenter, _NoNetwork(device))
    generator = torch.Generator(device).manual_seed(0)
    return StepContext(task, len(groups) - 1, model, model, 1, _no_scan, generator)


def _no_scan(name: str) -> Iterator[Batch]:
    return iter(())


def measure_loss(case: Case, repeats: int) -> dict[str, float]:
    """Measure time and memory of one case in both implementations.

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


def measure_growth(case: Case) -> dict[str, float]:
    """Measure the peak memory of a later step with few and with many old classes, and its growth."""
    peaks: dict[str, int] = {}
    for old in (FEW_CLASSES, MANY_CLASSES):
        path = LossPath(replace(case, old=old))
        for prefix, call in (("", path.lean), ("dense_", path.dense)):
            call()
            path.forget()
            peaks[f"{prefix}bytes_{old}"] = peak_bytes(call)
    return {
        **peaks,
        "growth": peaks[f"bytes_{MANY_CLASSES}"] / peaks[f"bytes_{FEW_CLASSES}"],
        "dense_growth": peaks[f"dense_bytes_{MANY_CLASSES}"] / peaks[f"dense_bytes_{FEW_CLASSES}"],
    }
