"""The colours of masks."""

import numpy as np


def voc_palette() -> np.ndarray:
    """The [256, 3] uint8 RGB colours of PASCAL VOC masks: bit 3k + c of an index is bit 7 - k of colour c."""
    indices, channels = np.arange(256)[:, None], np.arange(3)
    planes = [(indices >> (3 * k + channels) & 1) << (7 - k) for k in range(3)]
    return np.sum(planes, axis=0).astype(np.uint8)
