"""Cache of decoded images and masks in memory shared by forked loader workers (`data.cache`)."""

from __future__ import annotations

import math
import mmap
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from starseg.data.datasets.base import Split
from starseg.data.images import image_size, read_image, read_mask
from starseg.errors import UserError
from starseg.utils.machine import available_memory


class ImageCache:
    """Decoded files of a split, each stored by the process that reads it first; other files are not cached.

    The memory is anonymous and shared: workers that are forked later see what those before them decoded, and nothing
    is left behind. Two processes that decode the same file at once write the same bytes.

    Args:
        shapes: of the files' decoded arrays, see :func:`decoded_shapes`.
    """

    def __init__(self, shapes: dict[Path, tuple[int, ...]]) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        pixels = memoryview(mmap.mmap(-1, sum(sizes)))
        ends = np.cumsum(sizes).tolist()
        self._arrays = {
            path: (number, np.frombuffer(pixels[end - size : end], np.uint8).reshape(shape))
            for number, ((path, shape), size, end) in enumerate(zip(shapes.items(), sizes, ends, strict=True))
        }
        self._kept = np.frombuffer(mmap.mmap(-1, len(shapes)), np.bool_)
        # Between processes, orders a file's bytes before the mark that they are there.
        self._lock = multiprocessing.Lock()

    def image(self, path: Path) -> Tensor:
        """Return what :func:`read_image` returns; not to be modified."""
        return torch.from_numpy(self._read(path, _image_array)).permute(2, 0, 1)

    def mask(self, path: Path) -> np.ndarray:
        """Return what :func:`read_mask` returns; not to be modified."""
        return self._read(path, read_mask)

    def _read(self, path: Path, decode: Callable[[Path], np.ndarray]) -> np.ndarray:
        number, array = self._arrays.get(path, (0, None))
        if array is None:
            return decode(path)
        with self._lock:
            kept = self._kept[number]
        if not kept:
            decoded = decode(path)
            if decoded.shape != array.shape:
                return decoded
            array[:] = decoded
            with self._lock:
                self._kept[number] = True
        return array


def _image_array(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def decoded_shapes(split: Split) -> dict[Path, tuple[int, ...]]:
    """Return the decoded shapes of a split's images [H, W, 3] and masks [H, W], read from the images' headers.

    Raises:
        UserError: an image is missing or no image.
    """
    shapes: dict[Path, tuple[int, ...]] = {}
    for image, mask in zip(split.images, split.masks, strict=True):
        size = image_size(image, whole=False)
        shapes |= {image: (*size, 3), mask: size}
    return shapes


def make_cache(
    setting: Literal["ram", "off", "auto"], split: Split, processes: int, console: Console
) -> ImageCache | None:
    """Create the empty cache that `data.cache` asks for.

    Args:
        setting: "ram", "off", or "auto": if it takes at most half of this process's part of the available memory.
        split: the files.
        processes: how many on this machine share the memory, each with a cache of its own.
        console: told what is kept.

    Raises:
        UserError: "ram", and it takes more than this process's part.
    """
    if setting == "off":
        return None
    shapes = decoded_shapes(split)
    size, part = sum(map(math.prod, shapes.values())), available_memory() // processes
    says = f"{len(split)} decoded images and masks take {size / 1e9:.1f} GB, available are {part / 1e9:.1f}"
    if setting == "ram" and size > part:
        raise UserError(f"data.cache: {says} for each of {processes} process(es); set it to off or auto")
    fits = setting == "ram" or size <= part / 2
    console.print(f"data.cache: {says}: {'kept' if fits else 'not kept'}", highlight=False)
    return ImageCache(shapes) if fits else None
