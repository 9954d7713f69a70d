"""Class index: how many pixels of each id every mask holds; scanned once in parallel, cached on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from starseg.data.dataset import Dataset, Split
from starseg.errors import UserError

_VERSION = 1


def cache_dir() -> Path:
    """Where indices are kept: $STARSEG_CACHE, else ~/.cache/starseg."""
    return Path(os.environ.get("STARSEG_CACHE") or Path.home() / ".cache" / "starseg")


def read_mask(path: Path) -> np.ndarray:
    """The mask's ids, [H, W] uint8 (palette or grey PNG).

    Raises:
        UserError: unreadable, or not one 8-bit channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise UserError(f"{path}: a mask must be an 8-bit palette or grey image, this is {image.mode!r}")
            return np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise UserError(f"{path}: cannot read this mask ({error})") from error


def _count(path: Path) -> np.ndarray:
    return np.bincount(read_mask(path).ravel(), minlength=256).astype(np.int32)


def _key(root: Path, masks: Sequence[Path]) -> str:
    digest = hashlib.sha256(f"{_VERSION} {root.resolve()}".encode())
    for path in masks:
        stat = path.stat()
        digest.update(f"{path.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:24]


def scan_masks(masks: Sequence[Path]) -> np.ndarray:
    """Count the pixels of every id in every mask, [N, 256] int32, on all cores."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return np.stack(list(pool.map(_count, masks, chunksize=max(1, min(256, len(masks) // 8)))))


def class_index(dataset: Dataset, split: Split) -> np.ndarray:
    """Pixels of every id in every mask of a split, from the cache where the same files were scanned before.

    The cache is keyed by the list of masks with their sizes and modification times.

    Returns:
        [len(split), 256] int32; ``index > 0`` is the presence matrix.
    """
    path = cache_dir() / "index" / f"{_key(dataset.root, split.masks)}.npz"
    if path.is_file():
        try:
            return np.load(path, allow_pickle=False)["pixels"]
        except (OSError, ValueError, KeyError):
            path.unlink()
    pixels = scan_masks(split.masks)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez_compressed(file, pixels=pixels)
    partial.replace(path)
    return pixels
