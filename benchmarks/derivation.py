"""Compare the prototypes that STAR or STAR-Basic measured with those that the classifier implies.

    python benchmarks/derivation.py runs/demo/star/step_3
    python benchmarks/derivation.py runs/basic/step_0 --next runs/lite

Prints the cosine of the measured prototype of every class with the derived one (the limit of AdamW's iterations) and
with the published best of 500,000 iterations, in float32 and in float64, and the cosines of these with each other; with
--next, also the cosine with the prototype with which STAR-Lite begins the next step, the derived one and that of the
features seen in the step's images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from starseg.engine.checkpoint import load_bank, load_model
from starseg.engine.rundir import load_run_config
from starseg.engine.runner import Runner
from starseg.methods.star_lite import StarLite
from starseg.models.classifiers import linear_classifier
from starseg.replay.derivation import derive_prototypes, iterate_adamw
from starseg.utils.overrides import override


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", type=Path, help="directory of a step trained with STAR or STAR-Basic")
    parser.add_argument("--iterations", type=int, default=500_000)
    parser.add_argument("--next", type=Path, help="run of STAR-Lite that continues from the step")
    args = parser.parse_args()
    model, info = load_model(args.step)
    measured = load_bank(args.step)["prototypes"]
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
    if args.next:
        columns["derived and seen"] = (_begun(args.next, info.step + 1), measured)
    print("| class | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for row, name in enumerate(info.names[1:]):
        values = [float(a[row] @ b[row]) for a, b in columns.values()]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    means = [float((a * b).sum(1).mean()) for a, b in columns.values()]
    print("| mean | " + " | ".join(f"{value:.3f}" for value in means) + " |")


def _begun(run: Path, step: int) -> Tensor:
    """Return the prototypes with which STAR-Lite begins a step."""
    with Runner(load_run_config(run, [override("out", str(run))]), Console(), range(step, step + 1)) as runner:
        method = runner.begin(step)
        assert isinstance(method, StarLite) and method.bank is not None
        return method.bank.prototypes.cpu()


if __name__ == "__main__":
    main()
