"""Colours of masks."""

import numpy as np

from starseg.tasks import IGNORE

IGNORE_COLOUR = (224, 224, 192)


def voc_palette() -> np.ndarray:
    """Return the RGB colours [256, 3] uint8 of PASCAL VOC: bit 3k + c of an index is bit 7 - k of colour c."""
    indices, channels = np.arange(256)[:, None], np.arange(3)
    planes = [(indices >> (3 * k + channels) & 1) << (7 - k) for k in range(3)]
    return np.sum(planes, axis=0).astype(np.uint8)


def paint(ids: np.ndarray) -> np.ndarray:
    """Return the colours [..., 3] uint8 of ids [...] uint8; 255 (ignored) is cream, as in VOC."""
    colours = voc_palette()
    colours[IGNORE] = IGNORE_COLOUR
    return colours[ids]
