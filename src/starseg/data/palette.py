"""Colours of masks."""

from collections.abc import Sequence

import numpy as np

from starseg.tasks import IGNORE

IGNORE_COLOUR = (224, 224, 192)


def voc_palette() -> np.ndarray:
    """Return the RGB palette of PASCAL VOC masks, [256, 3] uint8: bit 3k + c of an index is bit 7 - k of channel c."""
    indices, channels = np.arange(256)[:, None], np.arange(3)
    planes = [(indices >> (3 * k + channels) & 1) << (7 - k) for k in range(3)]
    return np.sum(planes, axis=0).astype(np.uint8)


def mask_palette(mask_ids: Sequence[int], class_ids: Sequence[int]) -> np.ndarray:
    """Return the palette of predicted masks, [256, 3] uint8, in which each class has the VOC colour of its class id.

    Args:
        mask_ids: id of each class in the masks.
        class_ids: class id of each class.
    """
    palette = voc_palette()
    palette[list(mask_ids)] = voc_palette()[list(class_ids)]
    return palette


def paint(ids: np.ndarray) -> np.ndarray:
    """Return the colours [..., 3] uint8 of ids [...] uint8; 255 (ignore) is cream, as in the images of PASCAL VOC."""
    colours = voc_palette()
    colours[IGNORE] = IGNORE_COLOUR
    return colours[ids]
