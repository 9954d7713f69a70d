"""Compare the prototypes that STAR measured with those that its classifier implies.

    python benchmarks/derivation.py runs/demo/star/step_3

Prints the cosine of the measured prototype of every class with the derived one (the limit of AdamW's iterations) and
with the published best of 500,000 iterations, in float32 and in float64, and the cosines of these with each other.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from starseg.engine.checkpoint import load_bank, load_model
from starseg.models.classifiers import linear_classifier
from starseg.replay.bank import PrototypeBank
from starseg.replay.derivation import derive_prototypes, iterate_adamw


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", type=Path, help="directory of a step trained with STAR")
    parser.add_argument("--iterations", type=int, default=500_000)
    args = parser.parse_args()
    model, info = load_model(args.step)
    measured = PrototypeBank.from_state_dict(load_bank(args.step)).prototypes
    weight, bias = linear_classifier(model.heads)
    start = time.perf_counter()
    derived = derive_prototypes(weight, bias)
    print(f"derived in {time.perf_counter() - start:.2f} s")
    iterated = {}
    for dtype in (torch.float32, torch.float64):
        start = time.perf_counter()
        iterated[dtype] = iterate_adamw(weight.to(dtype), bias.to(dtype), args.iterations).float()
        print(f"iterated in {dtype} in {time.perf_counter() - start:.0f} s")
    single, double = iterated[torch.float32], iterated[torch.float64]
    columns: dict[str, tuple[Tensor, Tensor]] = {
        "derived": (derived, measured),
        "iterated 32": (single, measured),
        "iterated 64": (double, measured),
        "derived, iterated 32": (derived, single),
        "derived, iterated 64": (derived, double),
        "iterated 32, 64": (single, double),
    }
    print("| class | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for row, name in enumerate(info.names[1:]):
        values = [float(a[row] @ b[row]) for a, b in columns.values()]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    means = [float((a * b).sum(1).mean()) for a, b in columns.values()]
    print("| mean | " + " | ".join(f"{value:.3f}" for value in means) + " |")


if __name__ == "__main__":
    main()
