"""Measure the effect of four deviations from the published code on the real VOC subset (docs/fidelity.md).

    python benchmarks/fidelity.py runs/fidelity      # crop 128, 3 epochs per step, one shared base step

Each variant changes one choice relative to the default. Finished runs are not repeated.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from starseg import load_config, register_method, train
from starseg.data.samples import Batch
from starseg.methods import StepContext
from starseg.methods.star import Star
from starseg.models import Output
from starseg.report.tables import comparison_table
from starseg.utils.files import read_json

CONFIG = Path(__file__).with_name("voc_subset.yaml")
SMALL = ["data.crop=128", "train.base.epochs=3", "train.later.epochs=3"]


def _with(ctx: StepContext, **choices: bool) -> StepContext:
    """The context with some choices of the published code."""
    return replace(ctx, choices=replace(ctx.choices, **choices))


@register_method("ignored-negative")
class IgnoredAreNegatives(Star):
    """STAR with pixels of label 255 as negatives of the new classes."""

    section = "star"

    def class_loss(self, batch: Batch, output: Output) -> Tensor:
        kept, self.ctx = self.ctx, _with(self.ctx, ignored_as_negatives=True)
        try:
            return super().class_loss(batch, output)
        finally:
            self.ctx = kept


@register_method("wrong-noise")
class NoiseAroundAnOldPrototype(Star):
    """STAR with the noise of a new class measured around an old class's prototype."""

    section = "star"

    def end_step(self, ctx: StepContext) -> None:
        super().end_step(_with(ctx, noise_around_row=True))


VARIANTS = {
    "default": [],
    "threshold-0": ["star.old_threshold=0"],
    "norm-per-vector": ["star.norm_noise=vector"],
    "ignored-negative": ["method=ignored-negative"],
    "wrong-noise": ["method=wrong-noise"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("overrides", nargs="*", help="key=value for all runs, such as data.root=...")
    args = parser.parse_args()
    console, runs = Console(), {}
    for name, changes in VARIANTS.items():
        console.rule(name)
        shared = [] if name == "default" else [f"start_from={args.out / 'default' / 'step_0'}"]
        changes = [*SMALL, *changes, *shared, f"out={args.out / name}", *args.overrides]
        runs[name] = train(load_config(CONFIG, changes), console=console)
    console.print(comparison_table({name: read_json(run / "results.json") for name, run in runs.items()}))


if __name__ == "__main__":
    main()
