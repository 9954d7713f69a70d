"""The cache of decoded images and masks (`data.cache`), in memory shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import math
import mmap
import multiprocessing
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from starseg.data.datasets.base import Split
from starseg.data.images import image_size, read_image, read_mask
from starseg.data.index import cache_dir, files_key
from starseg.errors import UserError
from starseg.utils import shared_memory
from starseg.utils.machine import available_memory

Shapes = dict[Path, tuple[int, ...]]

# How many bytes a process caches before it checks again whether there is memory left.
_CHUNK = 16 * 2**20
# Part of the memory available at the start of a run that caches leave free.
_RESERVE = 16
# Number of images from whose sizes that of a large data set is estimated.
_SAMPLE = 256


class ImageCache:
    """Cache of a split's decoded files, filled as processes first read them; files of other splits are not cached.

    The memory is shared by all processes that have the same file open, and is freed with the last of them. Two
    processes that decode the same image at the same time write the same bytes.

    Args:
        shapes: shape of the decoded array of each file, see :func:`decoded_shapes`.
        memory: file descriptor of :func:`needed_bytes` bytes of shared memory, zero or filled by another cache of the
            same files; it is closed with the cache. By default anonymous memory, which only forked processes share.
        reserve: bytes of available memory at which the cache stops growing.
    """

    def __init__(self, shapes: Shapes, memory: int | None = None, reserve: int = 0) -> None:
        total = needed_bytes(shapes)
        # Ensures that other processes see a file's bytes before the flag that marks them as cached.
        self._lock: AbstractContextManager[object] = multiprocessing.Lock()
        if memory is not None:
            weakref.finalize(self, os.close, memory)
            self._lock = shared_memory.FileLock(memory)
        sizes = [math.prod(shape) for shape in shapes.values()]
        content = memoryview(mmap.mmap(-1 if memory is None else memory, total))
        ends = np.cumsum(sizes).tolist()
        self._arrays = {
            path: (number, np.frombuffer(content[end - size : end], np.uint8).reshape(shape))
            for number, ((path, shape), size, end) in enumerate(zip(shapes.items(), sizes, ends, strict=True))
        }
        self._kept = np.frombuffer(content[total - len(shapes) :], np.bool_)
        self._reserve, self._has_room, self._unchecked = reserve, True, 0

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
        if kept:
            return array
        decoded = decode(path)
        if decoded.shape != array.shape or not self._may_grow(array.nbytes):
            return decoded
        array[:] = decoded
        with self._lock:
            self._kept[number] = True
        return array

    def _may_grow(self, size: int) -> bool:
        """Whether the memory suffices for ``size`` more bytes; it is looked up once per chunk."""
        if self._unchecked <= 0:
            self._has_room = not self._reserve or available_memory() - _CHUNK > self._reserve
            self._unchecked = _CHUNK
        self._unchecked -= size
        return self._has_room


def _wide_bytes(path: Path) -> np.ndarray:
    """Read a 16-bit mask as [H, W, 2] uint8."""
    ids = read_mask(path, wide=True)
    return ids.view(np.uint8).reshape(*ids.shape, 2)


def _image_array(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def decoded_shapes(split: Split, wide: bool = False, positions: Sequence[int] | None = None) -> Shapes:
    """Return the decoded shapes of a split's images, [H, W, 3], and masks, [H, W], from the headers of the images.

    Args:
        split: the files.
        wide: whether masks have 16 bits; they are then [H, W, 2].
        positions: the images to look at; all by default.

    Raises:
        UserError: an image file is missing or not a readable image.
    """
    shapes: Shapes = {}
    for place in range(len(split)) if positions is None else positions:
        size = image_size(split.images[place], whole=False)
        shapes |= {split.images[place]: (*size, 3), split.masks[place]: (*size, 2) if wide else size}
    return shapes


def needed_bytes(shapes: Shapes) -> int:
    """Return the size of a cache: every decoded file, and one byte that marks it as cached."""
    return sum(map(math.prod, shapes.values())) + len(shapes)


def make_cache(
    setting: Literal["ram", "off", "auto"], split: Split, console: Console, wide: bool = False
) -> ImageCache | None:
    """Create the cache that `data.cache` specifies, or open that of another process with the same files.

    Memory that the caches of other processes may still fill does not count as available.

    Args:
        setting: "ram" for a cache, "off" for none, "auto" for a cache if it takes at most half of the available memory.
        split: the files to cache.
        console: where the size and the decision are printed.
        wide: whether masks have 16 bits.

    Returns:
        The cache; None if there is none.

    Raises:
        UserError: the setting is "ram" and the cache exceeds the available memory.
    """
    # Elsewhere it is not known how much memory is available.
    if setting == "off" or (setting == "auto" and sys.platform != "linux"):
        return None
    name = f"cache{16 if wide else 8}-{files_key(Path('/'), (*split.images, *split.masks))}"
    memory = shared_memory.find(name)
    if memory is None and setting == "auto" and (size := _estimated_bytes(split, wide)) > (left := _memory_left()):
        _print_decision(console, split, size, left, "not kept in memory")
        return None
    shapes = decoded_shapes(split, wide)
    size = needed_bytes(shapes)
    with _one_at_a_time():
        memory, left = shared_memory.find(name) if memory is None else memory, _memory_left()
        kept = "shared with another process"
        if memory is None:
            if setting == "ram" and size > left:
                raise UserError(
                    f"data.cache: {len(split)} decoded images and masks take {size / 1e9:.1f} GB, available are "
                    f"{left / 1e9:.1f} GB; set it to off or auto"
                )
            if setting == "auto" and size > left / 2:
                _print_decision(console, split, size, left, "not kept in memory")
                return None
            memory, kept = shared_memory.create(name, size), "kept in memory"
    _print_decision(console, split, size, left, kept)
    return ImageCache(shapes, memory, left // _RESERVE)


def _memory_left() -> int:
    return max(0, available_memory() - shared_memory.unwritten_bytes())


def _estimated_bytes(split: Split, wide: bool) -> int:
    """Estimate the size of a cache from some of the images, as reading the headers of millions takes long."""
    places = range(0, len(split), math.ceil(len(split) / _SAMPLE))
    return needed_bytes(decoded_shapes(split, wide, places)) * len(split) // len(places)


def _print_decision(console: Console, split: Split, size: int, left: int, decision: str) -> None:
    console.print(
        f"data.cache: {len(split)} images and masks are {decision}: "
        f"{size / 1e9:.1f} GB decoded, {left / 1e9:.1f} GB available",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let processes of this user decide one after another, so that no two are promised the same memory."""
    with ExitStack() as stack:
        if (folder := cache_dir()) is not None:
            with suppress(OSError):  # a folder that cannot be written
                folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((folder / "memory.lock").open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield
