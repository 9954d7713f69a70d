"""Evaluation benchmark, compared with one image at a time and every class at full size.

Both run the same ResNet-101 in float32 on uint8 images in memory and end in a confusion matrix. The heads are shifted
so that an image shows a few of the classes: a twentieth of the cells has a positive logit of each of them, and no cell
one of the others.
"""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from starseg.bench.machine import SPEED_COLUMNS, SPEED_TITLE, beside_machine, speed_cells
from starseg.bench.reference import dense_confusion, unfused
from starseg.bench.step import BACKBONE
from starseg.bench.timing import alternate, bench_device, count_flops
from starseg.config import TrainConfig
from starseg.data.samples import Batch
from starseg.engine.evaluate import confusion_matrix
from starseg.engine.launch import make_fabric
from starseg.models import Architecture, make_network
from starseg.models.prediction import LargestLogit
from starseg.utils.precision import is_bf16_fast

CLASSES = {"voc": (20, 3), "ade": (150, 8)}
"""How many there are, and how many an image shows."""
_POSITIVE = 0.05


class EvalPath:
    """Batch of random images, and a network with ``classes`` classes that predicts ``shown`` of them."""

    def __init__(self, classes: int, shown: int, images: int, side: int, backbone: str) -> None:
        torch.manual_seed(0)
        device = make_fabric(TrainConfig()).device
        self.model, self.rule = make_network(Architecture(backbone), [classes]).eval().to(device), LargestLogit()
        labels = torch.randint(0, classes + 1, (images, side, side), dtype=torch.uint8)
        pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8)
        self.batch = Batch(pixels, labels, torch.arange(images))
        self.plain = unfused(self.model)
        with torch.inference_mode():
            logits = self.model(self.model.normalize(pixels[:1])).logits.movedim(1, 0).flatten(1)
            shift = 2 * logits.amax(1) - logits.amin(1)
            shift[:shown] = logits[:shown].quantile(1 - _POSITIVE, 1)
            for head in (self.model.heads[0], self.plain.heads[0]):
                head.bias -= shift

    def lean(self, bf16: bool = False) -> torch.Tensor:
        """Evaluate as a run does."""
        return torch.from_numpy(confusion_matrix(self.model, self.rule, [self.batch], bf16=bf16))

    @torch.inference_mode()
    def dense(self) -> torch.Tensor:
        """Evaluate with the dense reference."""
        return dense_confusion(self.plain, self.rule, [self.batch])


def measure_eval(
    classes: int, shown: int, images: int, side: int, repeats: int, backbone: str = BACKBONE
) -> dict[str, Any]:
    """Measure images per second of starseg, in bf16 too where the hardware is fast at it, and of the dense reference.

    Raises:
        RuntimeError: the results differ in more than pixels where two classes tie up to rounding.
    """
    path = EvalPath(classes, shown, images, side, backbone)
    lean, dense = path.lean(), path.dense()
    differing = int((lean - dense).abs().sum()) / 2 / int(dense.sum())
    if differing > 1e-5:
        raise RuntimeError(f"{classes} classes: {differing:.2%} of the pixels are predicted otherwise than densely")
    calls = [path.lean, path.dense]
    if is_bf16_fast(bench_device()):
        path.lean(bf16=True)
        calls.append(lambda: path.lean(bf16=True))
    seconds, dense_seconds, *bf16 = alternate(calls, repeats, warm=True)
    flops = count_flops(path.dense)
    found: dict[str, Any] = {
        "speedup": dense_seconds / seconds,
        "images_per_second": images / seconds,
        "dense_images_per_second": images / dense_seconds,
        "differing_pixels": differing,
        "speed": {"float32": beside_machine(flops, seconds, torch.float32)},
    }
    if bf16:
        found |= {"bf16_images_per_second": images / bf16[0], "bf16_speedup": dense_seconds / bf16[0]}
        found["speed"]["bfloat16"] = beside_machine(flops, bf16[0], torch.bfloat16)
    return found


def bench_eval(console: Console, side: int, images: int, repeats: int, backbone: str = BACKBONE) -> dict[str, Any]:
    """Measure and print the section "eval": {"voc", "ade"}, see :func:`measure_eval`."""
    title = f"{backbone}, {side} px, batch {images}, densely in float32"
    table = Table("evaluation", "images/s", "densely", "faster", "pixels that differ", title=title)
    limits = Table("evaluation", *SPEED_COLUMNS, title=SPEED_TITLE)
    found = {}
    for name, (classes, shown) in CLASSES.items():
        f = found[name] = measure_eval(classes, shown, images, side, repeats, backbone)
        speeds = (f"{f['images_per_second']:.2f}", f"{f['dense_images_per_second']:.2f}", f"{f['speedup']:.2f} x")
        table.add_row(f"{name}, {shown} of {classes} classes", *speeds, f"{f['differing_pixels']:.1g}")
        if "bf16_speedup" in f:
            table.add_row(f"{name}, bf16", f"{f['bf16_images_per_second']:.2f}", "", f"{f['bf16_speedup']:.2f} x", "")
        for dtype, speed in f["speed"].items():
            limits.add_row(f"{name}, {dtype}", *speed_cells(speed))
    console.print(table)
    console.print(limits)
    return found
