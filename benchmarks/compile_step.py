"""Measure ways of running a training step: data types, memory formats, optimizers, CUDA graphs and torch.compile.

Usage: python benchmarks/compile_step.py [--batch N] [--crop N] [--backbone NAME] [--repeats N] [--seconds LIMIT]

The step is that of STAR on VOC 15-1 step 1 (`starseg bench`, section "step"); "dense" is its dense reference. Every row
is measured on its own, in order of importance; none is begun after LIMIT seconds (60), but a compilation that has begun
is not interrupted. The time of a row is the least of several steps. A CUDA graph replays the kernels of a step without
launching them one by one. On a GPU, the kernels that take most of a bf16 step are named, too.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from starseg.bench.run import Case
from starseg.bench.step import BACKBONE, StepPath
from starseg.bench.timing import bench_device, count_flops

Call = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One way of running the step; `mode` is one of torch.compile, or "graph" for a CUDA graph."""

    name: str
    precision: str = "bf16-mixed"
    mode: str | None = None
    dense: bool = False
    tf32: bool = False
    contiguous: bool = False
    unfused_sgd: bool = False


ROWS = (
    Row("starseg, bf16"),
    Row("starseg, bf16, CUDA graph", mode="graph"),
    Row("dense, bf16", dense=True),
    Row("starseg, float32", "32"),
    Row("starseg, float32 with TF32", "32", tf32=True),
    Row("dense, float32", "32", dense=True),
    Row("dense, float32 with TF32", "32", dense=True, tf32=True),
    Row("starseg, bf16, contiguous instead of channels_last", contiguous=True),
    Row("starseg, bf16, SGD that is not fused", unfused_sgd=True),
    Row("dense, bf16, torch.compile", dense=True, mode="default"),
    Row("starseg, bf16, torch.compile", mode="default"),
    Row("starseg, bf16, torch.compile, reduce-overhead", mode="reduce-overhead"),
)


def autocast(row: Row) -> AbstractContextManager[object]:
    """Return the precision of a dense step; starseg's own chooses its."""
    half = row.precision == "bf16-mixed"
    return torch.autocast(bench_device().type, torch.bfloat16) if row.dense and half else nullcontext()


def prepare(row: Row, case: Case, backbone: str) -> tuple[StepPath, Call]:
    """Return the path of a row and the call to measure."""
    path = StepPath(case, backbone, row.precision)
    training, dense = path.training, path.dense_step
    networks = (dense.old, dense.new) if row.dense else (training.ctx.old_model, training.ctx.model)
    for network in networks:
        if row.contiguous:
            network.to(memory_format=torch.contiguous_format)
            network.normalize = lambda images, n=network: type(n).normalize(n, images).contiguous()
        if row.mode in ("default", "reduce-overhead"):
            network.compile(mode=row.mode)
    if row.unfused_sgd:
        for group in training.optimizer.param_groups:
            group["fused"] = False

    def run() -> Tensor:
        if row.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast(row):
            return path.dense() if row.dense else path.lean()

    return path, _graph(path) if row.mode == "graph" else run


def _graph(path: StepPath) -> Call:
    """Capture starseg's step as a CUDA graph, with fixed images and learning rates."""
    raw, stream = path.raw.map(lambda values: values.to(bench_device())), torch.cuda.Stream()
    path.training.clock.cuda = False  # events with times cannot be captured
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            path.training.iterate(raw)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(path.generator)
    with torch.cuda.graph(graph):
        path.training.iterate(raw)
    return graph.replay


def least(call: Call, repeats: int) -> tuple[float, float]:
    """Return the seconds of the first call, and the least of the following ones."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[0], min(times[1:])


def measure(row: Row, case: Case, backbone: str, repeats: int) -> str:
    """Measure a row and return its line of the table."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    path, call = prepare(row, case, backbone)
    # After the Fabric of the path, which switches TF32 off.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = row.tf32
    first, seconds = least(call, repeats)
    line = f"{1000 * seconds:.1f} ms, {case.batch / seconds:.1f} images/s, first call {first:.1f} s"
    if cuda:
        line += f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
    if row == ROWS[0]:
        flops = 1e-12 * count_flops(path.dense)
        line += f"; {flops:.2f} TFLOP a step, {flops / seconds:.1f} TFLOP/s"
    return line


def print_kernels(case: Case, backbone: str) -> None:
    """Print the launches of a bf16 step and the kernels that take most of its time."""
    path = StepPath(case, backbone, "bf16-mixed")
    for _ in range(2):
        path.lean()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        path.lean()
        torch.cuda.synchronize()
    found = [event for event in recorded.key_averages() if event.device_type == DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in found)
    print(f"{sum(e.count for e in found)} kernels take {total / 1000:.1f} ms of GPU time in a step; the longest:")
    for event in sorted(found, key=lambda e: -e.self_device_time_total)[:12]:
        print(f"  {event.self_device_time_total / total:6.1%} {event.count:5} x {event.key[:90]}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--backbone", default=BACKBONE)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args(arguments)
    start, case = time.monotonic(), Case(15, 1, options.batch, options.crop, "voc")
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "cpu"
    print(f"{options.backbone}, batch {options.batch}, crop {options.crop}, {name}, torch {torch.__version__}")
    for row in ROWS:
        if row.mode == "graph" and not cuda:
            continue
        if time.monotonic() - start > options.seconds:
            print(f"{row.name}: not measured, {options.seconds:.0f} s are over", flush=True)
            continue
        try:
            line = measure(row, case, options.backbone, options.repeats)
            print(f"{row.name}: {line}", flush=True)
            if row == ROWS[0] and cuda:
                print_kernels(case, options.backbone)
        except Exception as error:  # the other rows are still wanted
            print(f"{row.name}: failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
        torch.compiler.reset()
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
