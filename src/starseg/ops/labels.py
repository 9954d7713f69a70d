"""Integer types of labels: uint8 with 255 for ignored pixels, or int32 with 65535 in tasks of more than 254 classes."""

import torch
from torch import Tensor

from starseg.tasks import IGNORE, WIDE_IGNORE


def ignored_id(labels: Tensor) -> int:
    """Return the label of ignored pixels: 65535 for int32 labels, else 255."""
    return WIDE_IGNORE if labels.dtype == torch.int32 else IGNORE


def signed_ids(labels: Tensor) -> Tensor:
    """Return labels as signed integers that can be computed with: int32 labels as they are, others as int64."""
    return labels if labels.dtype == torch.int32 else labels.long()
