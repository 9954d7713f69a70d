"""Measure the effect of `train.compile` on a training step (STAR, VOC 15-1 step 1).

Usage: python benchmarks/compile_step.py [BATCH]
"""

import sys
import time

from starseg.bench.run import Case
from starseg.bench.step import StepPath
from starseg.bench.timing import alternate


def main(batch: int) -> None:
    case = Case(15, 1, batch, 512, "voc")
    plain, compiled = StepPath(case), StepPath(case, compiled=True)
    start = time.perf_counter()
    loss = compiled.lean().item()
    print(f"compiling, with the first step: {time.perf_counter() - start:.0f} s; loss {loss:.6f}")
    print(f"plain, first step: loss {plain.lean().item():.6f}")
    seconds = alternate([plain.lean, compiled.lean], 3, warm=True)
    print(f"batch {batch}: plain {seconds[0]:.2f} s, compiled {seconds[1]:.2f} s a step")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
