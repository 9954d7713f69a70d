"""Colours of masks."""

from collections.abc import Sequence

import numpy as np

from starseg.tasks import IGNORE, WIDE_IGNORE

IGNORE_COLOUR = (224, 224, 192)


def voc_palette() -> np.ndarray:
    """Return the RGB palette of PASCAL VOC masks, [256, 3] uint8: bit 3k + c of an index is bit 7 - k of channel c."""
    indices, channels = np.arange(256)[:, None], np.arange(3)
    planes = [(indices >> (3 * k + channels) & 1) << (7 - k) for k in range(3)]
    return np.sum(planes, axis=0).astype(np.uint8)


def mask_palette(mask_ids: Sequence[int], class_ids: Sequence[int]) -> np.ndarray:
    """Return the palette of predicted masks, [256, 3] uint8, in which each class has the VOC colour of its class id.

    With ids above 255 it has more rows, and the colours repeat.

    Args:
        mask_ids: id of each class in the masks.
        class_ids: class id of each class.
    """
    palette = np.resize(voc_palette(), (max(256, 1 + max(mask_ids)), 3))
    palette[list(mask_ids)] = voc_palette()[np.array(class_ids) % 256]
    return palette


def shown_ids(ids: np.ndarray) -> np.ndarray:
    """Return ids as uint8 for pictures: those of 16 bits modulo 256, with 255 for ignored pixels (65535)."""
    return ids if ids.dtype == np.uint8 else np.where(ids == WIDE_IGNORE, IGNORE, ids % 256).astype(np.uint8)


def paint(ids: np.ndarray) -> np.ndarray:
    """Return the colours [..., 3] uint8 of ids [...]; 255 (ignore) is cream, as in the images of PASCAL VOC."""
    colours = voc_palette()
    colours[IGNORE] = IGNORE_COLOUR
    return colours[shown_ids(ids)]
