"""Where the time of a STAR training step goes: random images in the shapes of VOC 15-1, step 1.

python benchmarks/step_time.py [--backbone resnet101] [--crop 512] [--batch 2] [--repeats 5]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from starseg.data.step import Batch
from starseg.engine.fit import make_optimizer
from starseg.methods import METHODS, StepContext
from starseg.models import Output, Segmenter
from starseg.replay.statistics import FeatureStatistics
from starseg.tasks import make_task


class Clock:
    """Seconds spent in named parts."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts.setdefault(name, []).append(time.perf_counter() - start)

    def timed(self, name: str, network: Callable[..., Output]) -> Callable[..., Output]:
        """``network`` with every call timed."""

        def call(*args: torch.Tensor) -> Output:
            with self.time(name):
                return network(*args)

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    torch.manual_seed(0)
    task = make_task("voc", ["background", *map(str, range(1, 21))], "15-1")
    model = Segmenter(args.backbone, [15]).to(memory_format=torch.channels_last).eval()
    old = copy.deepcopy(model).requires_grad_(False)
    model.add_head(1)
    images = torch.randint(0, 256, (args.batch, 3, args.crop, args.crop), dtype=torch.uint8)
    labels = torch.tensor([0, 16])[torch.randint(0, 2, (args.batch, args.crop // 32, args.crop // 32))]
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2).byte()
    batch = Batch(model.normalize(images), labels, torch.arange(args.batch))

    def scan(name: str) -> Iterator[Batch]:
        yield batch

    method = METHODS["star"](METHODS["star"].Options())
    statistics_ = FeatureStatistics.zeros(15, 256)
    statistics_.update(torch.rand(4, 256, 16, 16), torch.randint(0, 16, (4, 16, 16)))
    method.bank = statistics_.finish()
    ctx = StepContext(task, 1, "voc", False, model, old, 1, scan, torch.Generator().manual_seed(0))
    method.freeze(ctx)
    with torch.no_grad():
        method.begin_step(ctx)
    optimizer = make_optimizer(method, ctx, 1e-4, 1e-4)
    clock = Clock()

    new, previous = clock.timed("new forward", model), clock.timed("old forward", torch.no_grad()(old))
    for _ in range(args.repeats + 1):
        with clock.time("step"):
            with clock.time("losses"):
                losses = method.losses(batch, new, previous)
            with clock.time("backward"):
                sum(losses.values()).backward()
            with clock.time("optimizer"):
                optimizer.step()
                optimizer.zero_grad()

    median = {name: statistics.median(values[1:]) for name, values in clock.parts.items()}
    median["losses"] -= median["old forward"] + median["new forward"]
    print(f"{args.backbone}, crop {args.crop}, batch {args.batch}, float32, median of {args.repeats}")
    for name, seconds in median.items():
        print(f"{name:12} {seconds:7.3f} s  {100 * seconds / median['step']:5.1f} %")


if __name__ == "__main__":
    main()
