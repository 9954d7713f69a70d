"""Data loading benchmark: from JPEG and mask files to batches, compared with the published order of operations."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import default_collate
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from starseg.bench.timing import alternate
from starseg.config import DataConfig
from starseg.data.cache import ImageCache, decoded_shapes
from starseg.data.datasets import Split, data_root
from starseg.data.images import read_image, read_mask
from starseg.data.loader import collate
from starseg.data.palette import voc_palette
from starseg.data.samples import StepDataset, relabel
from starseg.data.transforms import train_transform
from starseg.models import Segmenter
from starseg.tasks import IGNORE

_WIDTH, _HEIGHT, _BATCH = 500, 375, 8
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_NEW = 16  # the class of VOC 15-1, step 1


def write_files(folder: Path, count: int) -> tuple[Split, str]:
    """Write JPEG images of 500 x 375 pixels, quality 95, with palette masks.

    Args:
        folder: where to.
        count: number of images; photographs from `data.root`'s default folder if it has enough, otherwise synthetic.

    Returns:
        The files, and what they are.
    """
    root = data_root(DataConfig())
    found = sorted(root.glob("SegmentationClass/*.png"))[:count]
    images, masks = [folder / f"{i}.jpg" for i in range(count)], [folder / f"{i}.png" for i in range(count)]
    for i, (image_file, mask_file) in enumerate(zip(images, masks, strict=True)):
        image: Image.Image
        mask: Image.Image
        if len(found) == count:
            image, mask = (Image.open(path) for path in (root / "JPEGImages" / f"{found[i].stem}.jpg", found[i]))
        else:
            image, mask = _drawn(torch.Generator().manual_seed(i))
        image.resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC).save(image_file, quality=95)
        mask.resize((_WIDTH, _HEIGHT), Image.Resampling.NEAREST).save(mask_file)
    kind = f"photographs of {root}" if len(found) == count else "synthetic images"
    return Split(tuple(images), tuple(masks), tuple(map(str, range(count)))), kind


def _drawn(generator: torch.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw octave noise with about a photograph's spectrum, and a mask of smooth regions with three ids."""

    def noise(channels: int, side: int) -> Tensor:
        small = torch.randn(1, channels, side * 3 // 4, side, generator=generator)
        return interpolate(small, (_HEIGHT, _WIDTH), mode="bicubic")[0]

    values = sum(noise(3, side) * 160 / side**0.6 for side in (4, 8, 16, 32, 64, 128, 256))
    image = (128 + cast(Tensor, values)).clamp(0, 255).byte().permute(1, 2, 0)
    mask = np.array([0, _NEW, 1, IGNORE], np.uint8)[noise(4, 4).argmax(0).numpy()]
    indexed = Image.fromarray(mask)
    indexed.putpalette(voc_palette().tobytes())
    return Image.fromarray(image.numpy()), indexed


def published(image_file: Path, mask_file: Path, crop: int) -> tuple[Tensor, Tensor]:
    """Prepare a sample as published: PIL crops, floats normalised on the CPU, a Python function per label."""
    image, mask = Image.open(image_file).convert("RGB"), Image.open(mask_file)
    box = RandomResizedCrop.get_params(image, [0.5, 2.0], [3 / 4, 4 / 3])
    image = F.resized_crop(image, *box, [crop, crop], F.InterpolationMode.BILINEAR)
    mask = F.resized_crop(mask, *box, [crop, crop], F.InterpolationMode.NEAREST)
    if random.random() < 0.5:
        image, mask = F.hflip(image), F.hflip(mask)
    pixels = F.normalize(F.to_tensor(image), _MEAN, _STD)
    kept = [0, _NEW, IGNORE]
    return pixels, torch.from_numpy(np.array(mask)).apply_(lambda label: label if label in kept else 0)


def measure_data(folder: Path, crop: int, count: int, repeats: int) -> dict[str, Any]:
    """Measure seconds per image on one core, from the files to a batch, in total and by part."""
    split, kind = write_files(folder, count)
    table = np.zeros(256, np.uint8)
    table[[_NEW, IGNORE]] = 1, IGNORE
    data, cache = StepDataset(split, np.arange(count), table, crop, (0, 0)), ImageCache(decoded_shapes(split))
    images, masks = [read_image(p) for p in split.images], [torch.from_numpy(read_mask(p))[None] for p in split.masks]
    samples = [data[0, i] for i in range(count)]
    collated = [collate(samples[start : start + _BATCH]).images for start in range(0, count, _BATCH)]
    network = cast(
        Segmenter, SimpleNamespace(mean=torch.tensor(_MEAN)[:, None, None], std=torch.tensor(_STD)[:, None, None])
    )

    def batches(sample: Callable[[int], Any], join: Callable[[list[Any]], Any]) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, count, _BATCH):
                join([sample(i) for i in range(start, min(start + _BATCH, count))])

        return run

    def each(change: Callable[..., Any], *columns: Any) -> Callable[[], None]:
        def run() -> None:
            for row in zip(*columns, strict=True):
                change(*row)

        return run

    timed = {
        "seconds": batches(lambda i: data[0, i], collate),
        "dense_seconds": batches(lambda i: published(split.images[i], split.masks[i], crop), default_collate),
        "cached_seconds": batches(lambda i: data.request((0, i)).read(cache), collate),
        "decode image": each(read_image, split.images),
        "decode mask": each(read_mask, split.masks),
        "crop, resize, flip": each(lambda image, mask: train_transform(image, mask, crop), images, masks),
        "relabel": each(lambda mask: relabel(mask[0].numpy(), table.tobytes()), masks),
        "collate": batches(lambda i: samples[i], collate),
        "not the worker's: normalise (float32, CPU)": each(
            lambda images: Segmenter.normalize(network, images), collated
        ),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader worker
    try:
        medians = alternate(list(timed.values()), repeats, time.process_time)
    finally:
        torch.set_num_threads(threads)
    found: dict[str, Any] = {name: seconds / count for name, seconds in zip(timed, medians, strict=True)}
    parts = {name: found.pop(name) for name in list(timed)[3:]}
    return {"speedup": found["dense_seconds"] / found["seconds"], **found, "parts": parts, "files": kind}


def data_section(console: Console, quick: bool) -> dict[str, Any]:
    """Measure and print the section "data".

    Returns:
        {"pipeline": {"speedup", "seconds", "dense_seconds", "cached_seconds", "parts", "files"}}, seconds of one core
        for an image.
    """
    crop, count, repeats = (128, 4, 1) if quick else (512, 16, 5)
    with TemporaryDirectory() as folder:
        found = measure_data(Path(folder), crop, count, repeats)
    table = Table("one loader worker", "ms an image", "images/s", title=f"{_WIDTH} x {_HEIGHT}, {found['files']}")
    for name, key in (("starseg", "seconds"), ("with data.cache", "cached_seconds"), ("published", "dense_seconds")):
        table.add_row(name, f"{1e3 * found[key]:.2f}", f"{1 / found[key]:.0f}")
    table.add_row(f"faster: {found['speedup']:.1f} x")
    for name, seconds in found["parts"].items():
        table.add_row(f"  {name}", f"{1e3 * seconds:.2f}")
    console.print(table)
    return {"pipeline": found}
