"""Oracles of the loss path: the formulas implemented literally at image size, without code of the product.

Shape letters: N images, K classes, H W pixels, h w feature cells. Label 0 is the background, 255 is ignored.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upsample(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [N, K, h, w] at size (H, W), bilinear with half-pixel centres."""
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def base_loss(logits: Tensor, labels: Tensor, first_id: int, pos_weight: float, published: bool = False) -> Tensor:
    """Binary cross-entropy of each class, averaged over pixels; see :func:`starseg.losses.star.bce_per_class`.

    Args:
        logits: [N, K, H, W].
        labels: [N, H, W]; class k is labelled ``first_id + k``.
        first_id: label of the first class.
        pos_weight: weight of the pixels labelled with the class.
        published: count ignored pixels as negatives instead of leaving them out.

    Returns:
        [K].
    """
    counted = torch.ones_like(labels, dtype=torch.bool) if published else labels != 255
    losses = []
    for k, logit in enumerate(logits.unbind(1)):
        positive, negative = -pos_weight * F.logsigmoid(logit), -F.logsigmoid(-logit)
        pixels = torch.where(labels == first_id + k, positive, negative)
        losses.append(pixels[counted].sum() / max(int(counted.sum()), 1))
    return torch.stack(losses)


def old_model_labels(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """[N, H, W] labels that the old model's logits [N, K, H, W] give: the largest one's, if it exceeds a threshold."""
    best, winner = logits.max(1)
    return torch.where(best > threshold, winner + 1, 0)
