"""Measure constellation against STAR, and how it grows with images and with classes.

    python benchmarks/constellation_growth.py steps --work /tmp/growth      # a later step of both methods
    python benchmarks/constellation_growth.py steps --work /tmp/growth --precision auto --repeats 3
    python benchmarks/constellation_growth.py images --work /tmp/growth     # constellation, with more and more images
    python benchmarks/constellation_growth.py classes                       # bank and classifier, 10 to 150 classes

The steps are trained on synthetic images with EfficientNet-Lite0 (extra `lite`), each in a process of its own, which
reports its largest memory. Step 0 is trained briefly, as only the later step is measured. Repeated runs of a later step
start from the same step 0, and the one with the median CPU time is reported. The bank of many classes is random.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from operator import itemgetter
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


def settings(method: str, data: Path, out: Path, precision: str = "32") -> dict[str, Any]:
    """Return the configuration of a run of two steps, with the epochs of later steps of voc_subset.yaml.

    Their learning rate is a tenth of it, as STAR diverges at the full one after a step 0 of one epoch.
    """
    return {
        "method": method,
        "out": str(out),
        "data": {"root": str(data), "crop": SIZE},
        "task": {"name": "growth", "steps": [["disc", "square"], ["triangle"]]},
        "model": NETWORK,
        "train": {
            "batch_size": BATCH,
            "base": {"epochs": 1, "lr": 0.01},
            "later": {"epochs": EPOCHS, "lr": 0.0001},
            "precision": precision,
        },
        "constellation": {"base": "frozen"},
    }


def prepare(method: str, work: Path, images: int, precision: str = "32") -> tuple[Path, Path]:
    """Write images and train step 0 on them; return the folders of the data and of the run."""
    data = write_shapes(work / f"data_{images}", train=images, val=2 * BATCH, size=SIZE, classes=3)
    run = work / f"{method}_{images}_{precision}"
    train(parse_config(settings(method, data, run, precision)), range(1), Console(quiet=True))
    return data, run


def measure(method: str, work: Path, images: int, precision: str = "32", repeats: int = 1) -> dict[str, float]:
    """Train a later step, on those of the images that show its class, in a process of its own.

    Args:
        method: name of the method.
        work: folder for data and runs.
        images: number of training images.
        precision: see ``train.precision``.
        repeats: how often the step is trained, an odd number.

    Returns:
        The number of its images, its seconds and those of the CPU with the evaluation, and the largest memory of the
        process in bytes.
    """
    data, run = prepare(method, work, images, precision)
    command = [sys.executable, __file__, "one", "--work", str(run), "--data", str(data), "--method", method]
    found = []
    for _ in range(repeats):
        shutil.rmtree(run / "step_1", ignore_errors=True)
        done = subprocess.run([*command, "--precision", precision], check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return sorted(found, key=itemgetter("cpu"))[repeats // 2]


def one(method: str, data: Path, run: Path, precision: str = "32") -> None:
    """Train step 1 of a run and print its figures."""
    before = _cpu_seconds()
    train(parse_config(settings(method, data, run, precision)), range(1, 2), Console(quiet=True))
    metrics = read_json(run / "step_1" / "metrics.json")
    figures = {
        "images": metrics["images"],
        "seconds": metrics["seconds"],
        "cpu": _cpu_seconds() - before,
        "memory": _peak_memory(),
    }
    print(json.dumps(figures))


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of its finished children, which a busy machine hardly changes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _peak_memory() -> int:
    """Return the largest memory of this process in bytes; that of `getrusage` can be the parent's on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _row(found: dict[str, float]) -> str:
    figures = f"{found['images']} | {found['seconds']:.1f} | {found['cpu']:.1f} | {found['memory'] / 1e9:.2f} GB"
    return f"| {figures} |"


def steps(work: Path, precision: str, repeats: int) -> None:
    """Print the time and the memory of a later step of both methods."""
    print(f"a later step and its evaluation, {SIZE} px, precision {precision}; STAR: {EPOCHS} epochs")
    print(f"constellation: {OPTIONS.crops} crops, {OPTIONS.epochs} epochs of the classifier\n")
    print("| method | images | seconds | CPU seconds | memory |\n|---|---|---|---|---|")
    cpu = {}
    for method in ("star", "constellation"):
        found = measure(method, work, IMAGES, precision, repeats)
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
    parser.add_argument("--precision", default="32", help="train.precision of steps")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each later step of steps, an odd number")
    args = parser.parse_args()
    if args.what == "one":
        one(args.method, args.data, args.work, args.precision)
        return
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    if args.what == "classes":
        classes()
    elif args.what == "images":
        images(args.work / "images")
    else:
        steps(args.work / "steps", args.precision, args.repeats)


if __name__ == "__main__":
    main()
