"""Compare training crops of JPEGs decoded at full and at reduced size, `data.decode` (docs/performance.md).

Usage: python benchmarks/scaled_decoding.py VOC [COUNT], with VOC a data set in the VOC layout, whose photos and masks
are resized (JPEG quality 90). CPU milliseconds per image of one thread, from the files to the crop.
"""

import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from starseg.bench.timing import alternate
from starseg.data.datasets.base import Split
from starseg.data.datasets.voc import open_voc
from starseg.data.images import read_image, read_scaled
from starseg.data.samples import StepDataset, sample_seed
from starseg.data.transforms import TrainCrop, draw_crop

REPEATS = 5


def resized(split: Split, side: int, count: int, folder: Path) -> Split:
    """Write some of the images and masks with a long side of ``side`` pixels."""
    places = range(0, len(split), len(split) // count)[:count]
    files: tuple[list[Path], list[Path]] = [], []
    for place in places:
        image, mask = (Image.open(paths[place]) for paths in (split.images, split.masks))
        size = tuple(round(side * edge / max(image.size)) for edge in image.size)
        for kind, picture in (
            ("jpg", image.convert("RGB").resize(size, Image.Resampling.BICUBIC)),
            ("png", mask.resize(size, Image.Resampling.NEAREST)),
        ):
            path = folder / f"{place}.{kind}"
            picture.save(path, **({"quality": 90} if kind == "jpg" else {}))
            files[kind == "png"].append(path)
    return Split(tuple(files[0]), tuple(files[1]), tuple(map(str, places)))


def drawn(data: StepDataset, index: int, size: tuple[int, int]) -> TrainCrop:
    torch.manual_seed(sample_seed(0, 0, 0, index))
    return draw_crop(size)


def compare(split: Split, side: int, crop: int) -> None:
    count, table = len(split), np.arange(256, dtype=np.uint8)
    full, scaled = (StepDataset(split, np.arange(count), table, crop, (0, 0), scaled=s) for s in (False, True))

    def passes(data: StepDataset) -> None:
        for index in range(count):
            data[0, index]

    times = alternate([lambda: passes(full), lambda: passes(scaled)], REPEATS, time.process_time)
    scales, moved, same = Counter[int](), [], []
    for index, path in enumerate(split.images):
        image = read_image(path)
        size = image.shape[1], image.shape[2]
        box = drawn(full, index, size)
        scale = box.scale(crop)
        scales[scale] += 1
        got = scaled[0, index].images.float()
        moved.append((got - full[0, index].images.float()).abs().mean())
        if scale > 1:
            box = box.aligned(scale, size)
            assert torch.equal(got, box.resize(read_scaled(path, box.box, scale), crop).float())
        same.append((got - box.apply(image, crop).float()).abs().mean())
    of = ", ".join(f"1/{scale}: {100 * number / count:.0f} %" for scale, number in sorted(scales.items()))
    print(
        f"| {side} | {crop} | {1e3 * times[0] / count:.1f} | {1e3 * times[1] / count:.1f} | "
        f"{times[0] / times[1]:.2f} x | {of} | {torch.stack(same).mean():.2f} | {torch.stack(moved).mean():.2f} |",
        flush=True,
    )


def main(root: Path, count: int) -> None:
    torch.set_num_threads(1)
    split = open_voc(root).train
    print(
        "| long side | crop | full ms | scaled ms | faster | scale | difference, same crop | difference, full's crop |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for side in (320, 640, 1280, 2000):
        with TemporaryDirectory() as folder:
            images = resized(split, side, count, Path(folder))
            for crop in (96, 192, 320, 512):
                compare(images, side, crop)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 24)
