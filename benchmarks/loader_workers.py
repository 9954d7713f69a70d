"""Measure the start-up time of loader workers in the four passes of a step (docs/performance.md).

Usage: python benchmarks/loader_workers.py VOC, with VOC a data set in the VOC layout.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from starseg.bench.timing import alternate
from starseg.data.datasets.voc import open_voc
from starseg.data.loader import PersistentLoader
from starseg.data.samples import EpochSampler, StepDataset

PASSES = 4


def main(root: Path) -> None:
    ballast = torch.ones(250_000_000)  # A training process is large, which slows down forking.
    data = StepDataset(open_voc(root).train, np.arange(2), np.arange(256, dtype=np.uint8), 48, (0, 0))
    for workers in (2, 8):

        def passes(loadings: int, workers: int = workers) -> None:
            for _ in range(loadings):
                loading = PersistentLoader(workers)
                for _ in range(PASSES // loadings):
                    list(loading.over(data, EpochSampler(2, 2, [0], (0, 0))))
                loading.close()

        each, once = alternate([lambda p=passes: p(PASSES), lambda p=passes: p(1)], 5)
        print(f"{workers} workers, {ballast.nbytes / 1e9:.0f} GB: {each:.2f} s started in each pass, {once:.2f} s once")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
