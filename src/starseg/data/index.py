"""The class index: the number of pixels of each class in every mask.

Every file is read once, in parallel, and its pixel count per id on disk is cached. The label map is applied to the
cached counts, so that a changed label map requires no new scan.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from starseg.data.datasets.base import Dataset, Split
from starseg.data.images import image_size, read_mask, refuse_other_size
from starseg.errors import UserError
from starseg.tasks import BACKGROUND, WIDE_IGNORE
from starseg.utils.deprecation import old_names
from starseg.utils.machine import cores
from starseg.utils.terminal import print_note

__getattr__ = old_names(__name__)

_VERSION = 2


def cache_dir() -> Path | None:
    """Return the directory of cached class indices: $STARSEG_CACHE, or ~/.cache/starseg by default.

    Returns:
        None if neither the variable nor a home directory is known, as for a user id without an account.
    """
    if given := os.environ.get("STARSEG_CACHE"):
        return Path(given)
    try:
        return Path.home() / ".cache" / "starseg"
    except RuntimeError:
        return None


def pixels_per_id(mask: np.ndarray, columns: int = 256) -> np.ndarray:
    """Count the pixels of every id in a mask.

    Args:
        mask: [H, W] uint8; or uint16 if there are more than 256 columns.
        columns: number of counts (:attr:`starseg.data.labels.LabelMap.columns`).

    Returns:
        [columns] int32. Of more than 256, the last one counts all larger ids but 65535.
    """
    if columns == 256:
        return np.bincount(mask.ravel(), minlength=256).astype(np.int32)
    counts = np.bincount(mask.ravel(), minlength=WIDE_IGNORE + 1)
    return np.append(counts[: columns - 1], counts[columns - 1 : WIDE_IGNORE].sum()).astype(np.int32)


def _count(mask: Path, image: Path | None, columns: int = 256) -> np.ndarray:
    ids = read_mask(mask, wide=columns > 256)
    if image is not None:
        refuse_other_size(image_size(image), ids.shape, mask)
    return pixels_per_id(ids, columns)


def files_key(root: Path, files: Sequence[Path], columns: int = 256) -> str:
    """Return a digest of the names of files relative to ``root``, their sizes and modification times.

    Args:
        root: folder of the files.
        files: in order.
        columns: number of ids that are counted, 256 or more.
    """
    kind = f"{_VERSION} {columns}" if columns > 256 else str(_VERSION)
    digest = hashlib.sha256(f"{kind} {root.resolve()}".encode(errors="surrogateescape"))
    for path in files:
        stat = path.stat()
        line = f"{os.path.relpath(path, root)} {stat.st_size} {stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:24]


def scan_masks(masks: Sequence[Path], images: Sequence[Path] | None = None, columns: int = 256) -> np.ndarray:
    """Count the pixels of every id in every mask, [N, columns] int32, on all cores.

    Args:
        masks: mask files.
        images: image files; if given, they are read as well and their sizes are compared with the masks'.
        columns: see :func:`pixels_per_id`.

    Raises:
        UserError: a file is unreadable or truncated, or the sizes of a mask and its image differ.
    """
    beside: Sequence[Path | None] = images or [None] * len(masks)
    with ProcessPoolExecutor(cores()) as pool:
        size = max(1, min(256, len(masks) // 8))
        return np.stack(list(pool.map(_count, masks, beside, [columns] * len(masks), chunksize=size)))


def class_index(dataset: Dataset, split: Split) -> np.ndarray:
    """Count the pixels of every class in every mask of a split.

    Returns:
        [len(split), 256] int32 by class id, or as many columns as the label map has; ``index > 0`` is the presence
        matrix. Unlabelled classes count as
        background.

    Raises:
        UserError: an image or mask is unreadable, their sizes differ, or a mask contains ids outside the label map.
    """
    pixels = _cached_scan(dataset, split)
    unknown = dataset.labels.unknown(pixels)
    if (wrong := np.flatnonzero(unknown.any(1))).size:
        raise UserError(
            f"{split.masks[wrong[0]]}: ids {np.flatnonzero(unknown[wrong[0]]).tolist()} are no classes of this data "
            f"set ({dataset.labels}); {wrong.size} of {len(split)} masks hold such ids: fix them, or name the "
            "classes; `starseg data check` lists them"
        )
    counts = dataset.labels.class_pixels(pixels)
    if hidden := sorted(dataset.unlabelled):
        counts = counts.copy()
        counts[:, BACKGROUND] += counts[:, hidden].sum(1)
        counts[:, hidden] = 0
    return counts


def _cached_scan(dataset: Dataset, split: Split) -> np.ndarray:
    """Return pixel counts by id on disk, cached under a key of the files' names, sizes and modification times."""
    cache, columns = cache_dir(), dataset.labels.columns
    if cache is None:
        _note_not_cached("this user has no home directory")
        return scan_masks(split.masks, split.images, columns)
    path = cache / "index" / f"{files_key(dataset.root, (*split.images, *split.masks), columns)}.npz"
    with suppress(Exception), np.load(path, allow_pickle=False) as file:  # missing or damaged
        return file["pixels"]
    pixels = scan_masks(split.masks, split.images, columns)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez_compressed(file, pixels=pixels)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        _note_not_cached(f"{path} cannot be written ({error.strerror})")
    return pixels


def _note_not_cached(reason: str) -> None:
    print_note(f"the class index is not kept, {reason}; see $STARSEG_CACHE")
