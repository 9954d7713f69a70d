"""The cache of decoded images and masks (`data.cache`), in memory shared by forked loader workers."""

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
    """Cache of a split's decoded files, filled as processes first read them; files of other splits are not cached.

    The memory is anonymous and shared: workers forked later see what earlier workers decoded, and the memory is freed
    with the processes. Two processes that decode the same file at the same time write the same bytes.

    Args:
        shapes: shape of the decoded array of each file, see :func:`decoded_shapes`.
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
        # Ensures that other processes see a file's bytes before the flag that marks them as cached.
        self._lock = multiprocessing.Lock()

    def image(self, path: Path) -> Tensor:
        """Return an image as :func:`read_image` does; the tensor must not be modified."""
        return torch.from_numpy(self._read(path, _image_array)).permute(2, 0, 1)

    def mask(self, path: Path, wide: bool = False) -> np.ndarray:
        """Return a mask as :func:`read_mask` does; the array must not be modified."""
        return self._read(path, _wide_bytes).view(np.uint16)[..., 0] if wide else self._read(path, read_mask)

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


def _wide_bytes(path: Path) -> np.ndarray:
    """Read a 16-bit mask as [H, W, 2] uint8."""
    ids = read_mask(path, wide=True)
    return ids.view(np.uint8).reshape(*ids.shape, 2)


def _image_array(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def decoded_shapes(split: Split, wide: bool = False) -> dict[Path, tuple[int, ...]]:
    """Return the decoded shapes of a split's images, [H, W, 3], and masks, [H, W], from the headers of the images.

    Masks of 16 bits (``wide``) are [H, W, 2].

    Raises:
        UserError: an image file is missing or not a readable image.
    """
    shapes: dict[Path, tuple[int, ...]] = {}
    for image, mask in zip(split.images, split.masks, strict=True):
        size = image_size(image, whole=False)
        shapes |= {image: (*size, 3), mask: (*size, 2) if wide else size}
    return shapes


def make_cache(
    setting: Literal["ram", "off", "auto"], split: Split, processes: int, console: Console, wide: bool = False
) -> ImageCache | None:
    """Create the empty cache that `data.cache` specifies, or return None.

    Args:
        setting: "ram" for a cache, "off" for none, "auto" for a cache if it takes at most half of this process's share
            of the available memory.
        split: the files to cache.
        processes: number of processes on this machine that share the memory, each with its own cache.
        console: where the size and the decision are printed.
        wide: whether masks have 16 bits.

    Raises:
        UserError: the setting is "ram" and the cache exceeds this process's share of the available memory.
    """
    if setting == "off":
        return None
    shapes = decoded_shapes(split, wide)
    size, part = sum(map(math.prod, shapes.values())), available_memory() // processes
    says = f"{len(split)} decoded images and masks take {size / 1e9:.1f} GB, available are {part / 1e9:.1f}"
    if setting == "ram" and size > part:
        raise UserError(f"data.cache: {says} for each of {processes} process(es); set it to off or auto")
    fits = setting == "ram" or size <= part / 2
    console.print(f"data.cache: {says}: {'kept' if fits else 'not kept'}", highlight=False)
    return ImageCache(shapes) if fits else None
