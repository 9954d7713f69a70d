"""Bilinear resizing (``align_corners=False``) of whole maps or only at the pixels that are needed.

Shape letters: N images, C channels, H W pixels, h w cells of a smaller map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Maps are computed so many values at a time: what fits a core's cache, and what keeps a GPU busy.
_CHUNK_CPU, _CHUNK_GPU = 2**18, 2**24


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps [N, C, *, *] to [N, C, *size]: bilinear, ``align_corners=False``, no antialiasing."""
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def chunk_size(pixels: int, device: torch.device) -> int:
    """Return how many maps of ``pixels`` pixels to process at a time, at least one."""
    return max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK_GPU) // pixels)


def axis_weights(length: int, like: Tensor, dim: int) -> Tensor:
    """Return the matrix [length, h] that resizes dimension ``dim`` (of size h) of ``like`` to ``length``.

    Resizing a map m [h, w] is ``a @ m @ b.T`` with the matrices of its two axes; the adjoint is ``a.T @ g @ b``.
    """
    unit = torch.eye(like.shape[dim], dtype=like.dtype, device=like.device)
    return resize(unit[None, :, :, None], (length, 1))[0, :, :, 0].T


def support_indices(length: int, cells: int, device: torch.device | None = None) -> Tensor:
    """Return the indices of the pixels along an axis that a bilinear resize from ``length`` to ``cells`` reads.

    For whole strides s these are the two pixels around each cell's centre, s i + s/2 - 1 and s i + s/2, or the one
    there for odd s; else every pixel.
    """
    stride = length // cells
    if length != cells * stride:
        return torch.arange(length, device=device)
    centre = torch.arange(cells, device=device) * stride + stride // 2
    return centre if stride % 2 else torch.stack([centre - 1, centre], 1).flatten()


def subsample_to_support(pixels: Tensor, cells: Sequence[int]) -> Tensor:
    """Keep the pixels that a bilinear resize to ``cells`` reads: [N, H, W] -> [N, H', W'].

    Resizing it, or a mask made of it, to ``cells`` gives exactly what resizing the whole one does; its pixels at
    (s' i + s'/2, s' j + s'/2), with s' = H' / h, are those of the whole one at (s i + s/2, s j + s/2), s = H / h.
    """
    rows, columns = (support_indices(n, c, pixels.device) for n, c in zip(pixels.shape[1:], cells, strict=True))
    return pixels[:, rows[:, None], columns]


def resize_at_support(maps: Tensor, size: Sequence[int], cells: Sequence[int]) -> Tensor:
    """Resize to ``size`` only at the pixels kept by :func:`subsample_to_support`: [N, C, *, *] -> [N, C, H', W'].

    Equal to the whole resize up to the rounding of a weighted sum of four float32 values, in which the whole one also
    differs from device to device and between memory formats.
    """
    down, across = (
        axis_weights(n, maps, dim)[support_indices(n, c, maps.device)]
        for n, c, dim in zip(size, cells, (2, 3), strict=True)
    )
    with torch.autocast(maps.device.type, enabled=False):
        return down @ (maps @ across.T)


def channel_chunks(maps: Tensor, pixels: int) -> tuple[Tensor, ...]:
    """Split maps [N, C, h, w] along C into parts of the size that is processed at a time.

    Args:
        maps: to be resized.
        pixels: of a resized map.
    """
    return maps.split(chunk_size(pixels * len(maps), maps.device), 1)


def largest(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute ``torch.cat(parts, 1).max(1)`` part by part: the largest value and its first channel, [N, ...].

    Args:
        parts: at least one, [N, c, ...] each, without gradients.
    """
    best = winner = torch.empty(0)
    before = 0
    for part in parts:
        # A CPU goes through contiguous maps one by one, several times as fast as across them.
        candidates = part.split(1, 1) if part.device.type == "cpu" else (part,)
        for maps in candidates:
            value, index = (maps[:, 0], 0) if len(candidates) > 1 else maps.max(1)
            if not before:
                best, winner = value.clone(), torch.zeros_like(value, dtype=torch.int16).add_(index)
            else:
                # Channels come in ascending order, so the largest of those that improved is the last.
                winner = torch.maximum(winner, (value > best).to(winner.dtype).mul_(index + before))
                best = torch.maximum(best, value, out=best)
            before += maps.shape[1]
    assert before, "there is a class"
    return best, winner.long()
