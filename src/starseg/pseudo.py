"""Pseudo-labels: what a frozen previous model says of pixels that are labelled background.

Shape letters: N images, H W pixels, C logit channels. Labels are training ids, 0 background, 255 ignore.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starseg.tasks import BACKGROUND


def fill_in(labels: Tensor, logits: Tensor, score: float, lead: int = 0) -> Tensor:
    """Labels with the confident predictions of a sigmoid classifier filled in where they say background.

    Args:
        labels: [N, H, W] training ids.
        logits: [N, C, H, W], channel lead + c is training id c + 1.
        score: sigmoid from which on a prediction counts.
        lead: leading channels, which can win but are no class.

    Returns:
        [N, H, W] int64.
    """
    best, winner = logits.sigmoid().max(1)
    ids = winner + 1 - lead
    return torch.where((labels == BACKGROUND) & (ids > 0) & (best >= score), ids, labels.long())
