"""Measure constellation against STAR, and how it grows with images and with classes.

    python benchmarks/constellation_growth.py steps --work /tmp/growth      # a later step of both methods
    python benchmarks/constellation_growth.py images --work /tmp/growth     # constellation, with more and more images
    python benchmarks/constellation_growth.py classes                       # bank and classifier, 10 to 150 classes

The steps are trained on synthetic images with EfficientNet-Lite0 (extra `lite`), each in a process of its own, which
reports its largest memory. Step 0 is trained briefly, as only the later step is measured. The bank of many classes is
random.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from starseg.config import parse_config
from starseg.data.shapes import write_shapes
from starseg.experiments.train import train
from starseg.methods.constellation import ConstellationOptions
from starseg.models import Architecture, make_network
from starseg.models.classifiers import SOFTMAX, HeadLayout
from starseg.replay.gaussians import GaussianBank
from starseg.utils.files import read_json

OPTIONS = ConstellationOptions()
NETWORK = {"backbone": "tf_efficientnet_lite0", "pretrained": True}
SIZE, BATCH, EPOCHS, IMAGES = 192, 16, 6, 256


def settings(method: str, data: Path, out: Path) -> dict[str, Any]:
    """Return the configuration of a run of two steps, with the schedule of later steps of voc_subset.yaml."""
    return {
        "method": method,
        "out": str(out),
        "data": {"root": str(data), "crop": SIZE},
        "task": {"name": "growth", "steps": [["disc", "square"], ["triangle"]]},
        "model": NETWORK,
        "train": {
            "batch_size": BATCH,
            "base": {"epochs": 1, "lr": 0.01},
            "later": {"epochs": EPOCHS, "lr": 0.001},
            "precision": "32",
        },
        "constellation": {"base": "frozen"},
    }


def prepare(method: str, work: Path, images: int) -> tuple[Path, Path]:
    """Write images and train step 0 on them; return the folders of the data and of the run."""
    data = write_shapes(work / f"data_{images}", train=images, val=2 * BATCH, size=SIZE, classes=3)
    run = work / f"{method}_{images}"
    train(parse_config(settings(method, data, run)), range(1), Console(quiet=True))
    return data, run


def measure(method: str, work: Path, images: int) -> dict[str, float]:
    """Train a later step, on those of the images that show its class, in a process of its own.

    Returns:
        The number of its images, its seconds and those of the CPU with the evaluation, and the largest memory of the
        process in bytes.
    """
    data, run = prepare(method, work, images)
    command = [sys.executable, __file__, "one", "--work", str(run), "--data", str(data), "--method", method]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(method: str, data: Path, run: Path) -> None:
    """Train step 1 of a run and print its figures."""
    before = _cpu_seconds()
    train(parse_config(settings(method, data, run)), range(1, 2), Console(quiet=True))
    metrics = read_json(run / "step_1" / "metrics.json")
    figures = {
        "images": metrics["images"],
        "seconds": metrics["seconds"],
        "cpu": _cpu_seconds() - before,
        "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(figures))


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children, which a busy machine hardly changes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _row(found: dict[str, float]) -> str:
    figures = f"{found['images']} | {found['seconds']:.1f} | {found['cpu']:.1f} | {found['memory'] / 1e9:.2f} GB"
    return f"| {figures} |"


def steps(work: Path) -> None:
    """Print the time and the memory of a later step of both methods."""
    print(f"a later step and its evaluation, {SIZE} px; STAR: {EPOCHS} epochs")
    print(f"constellation: {OPTIONS.crops} crops, {OPTIONS.epochs} epochs of the classifier\n")
    print("| method | images | seconds | CPU seconds | memory |\n|---|---|---|---|---|")
    cpu = {}
    for method in ("star", "constellation"):
        found = measure(method, work, IMAGES)
        cpu[method] = found["cpu"]
        print(f"| {method} {_row(found)}", flush=True)
    print(f"\nSTAR takes {cpu['star'] / cpu['constellation']:.1f} times as many CPU seconds")


def images(work: Path) -> None:
    """Print the time and the memory of constellation with more and more images."""
    print("| images | seconds | CPU seconds | memory |\n|---|---|---|---|")
    for count in (IMAGES // 2, IMAGES, 2 * IMAGES, 4 * IMAGES):
        found = measure("constellation", work, count)
        print(_row(found), flush=True)


def random_bank(classes: int) -> GaussianBank:
    """Return a random bank of the default size."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.tensor([OPTIONS.background_modes, *[OPTIONS.modes] * classes])
    owners = torch.repeat_interleave(numbers).int()
    shape = (len(owners), OPTIONS.width)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).half()

    return GaussianBank(
        counts=torch.full((1 + classes,), 1e4),
        owners=owners,
        weights=(1 / numbers)[owners.long()],
        means=normal(*shape),
        deviations=normal(*shape).abs(),
        factors=normal(*shape, OPTIONS.factors) / 4,
    )


def classes() -> None:
    """Print the bank's size, and the time of an iteration of the classifier on draws from it, by number of classes."""
    print("| classes | bank | bytes per class | draw | classifier |\n|---|---|---|---|---|")
    for number in (10, 20, 50, 100, 150):
        bank = random_bank(number)
        size = sum(t.numel() * t.element_size() for t in bank.state_dict().values())
        amounts = torch.full((1 + number,), OPTIONS.draws / (1 + number))
        generator = torch.Generator().manual_seed(0)
        layout = HeadLayout(SOFTMAX.lead, hidden=OPTIONS.hidden)
        options = {"width": OPTIONS.width, "window": OPTIONS.window}
        model = make_network(Architecture("test_resnet", "descriptor", options=options), [number], layout)
        drawing = _seconds(lambda bank=bank, a=amounts, g=generator: bank.draw(a, g))
        features, ids = bank.draw(amounts, generator)

        def iterate(features: Tensor = features, ids: Tensor = ids, model: Any = model) -> None:
            logits = model.classify(features.T[None, :, :, None])[0, :, :, 0].T
            torch.nn.functional.cross_entropy(logits, ids).backward()

        training = _seconds(iterate)
        figures = f"{size / 1e6:.2f} MB | {size / (1 + number):,.0f} | {1e3 * drawing:.1f} ms | {1e3 * training:.1f} ms"
        print(f"| {number} | {figures} |", flush=True)


def _seconds(run: Any, repeats: int = 20) -> float:
    """Return the median time of a call, after one that is not counted."""
    marks = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        marks.append(time.perf_counter() - start)
    return sorted(marks[1:])[repeats // 2]


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "images", "classes", "one"))
    parser.add_argument("--work", type=Path, help="folder for data and runs")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "one":
        one(args.method, args.data, args.work)
        return
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    if args.what == "classes":
        classes()
    else:
        {"steps": steps, "images": images}[args.what](args.work)


if __name__ == "__main__":
    main()
