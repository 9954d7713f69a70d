"""Pseudo-labels: predictions of the frozen previous model for pixels that are labelled background.

Shape letters: N images, H W pixels, C logit channels, C° logit channels of the previous model. Labels are training ids,
0 background, 255 ignore.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from starseg.ops.labels import ignored_id, signed_ids
from starseg.tasks import BACKGROUND


def fill_in(labels: Tensor, logits: Tensor, score: float, lead: int = 0, background: int = BACKGROUND) -> Tensor:
    """Replace background labels by the confident predictions of a sigmoid classifier.

    Args:
        labels: [N, H, W].
        logits: [N, C, H, W]; channel lead + c is label c + 1.
        score: smallest sigmoid at which a prediction counts.
        lead: number of leading channels, which can win but are not classes.
        background: labels up to this one are background.

    Returns:
        [N, H, W] int64, or int32 for int32 labels.
    """
    best, winner = logits.sigmoid().max(1)
    ids, given = winner + 1 - lead, signed_ids(labels)
    return torch.where((labels <= background) & (ids > background) & (best >= score), ids.to(given.dtype), given)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax, divided by its maximum ln C: [N, C, H, W] -> [N, H, W] in [0, 1]."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])


def published_entropy(logits: Tensor, total: int) -> Tensor:
    """Return PLOP's uncertainty as published: :func:`entropy` divided by C ln(``total``), [N, H, W].

    It is at most 1 / (C ln total), so with many classes every value falls into the first of 100 bins.

    Args:
        logits: [N, C, H, W].
        total: number of all channels, including the new classes'.
    """
    return entropy(logits) / (logits.shape[1] * math.log(total))


@dataclass
class EntropyHistogram:
    """Histogram of values in [0, 1] for each class.

    Attributes:
        counts: [C, bins] int64.
    """

    counts: Tensor

    @classmethod
    def zeros(cls, classes: int, bins: int, device: torch.device) -> EntropyHistogram:
        """Return a histogram without values."""
        return cls(torch.zeros(classes, bins, dtype=torch.int64, device=device))

    def update(self, values: Tensor, classes: Tensor, chosen: Tensor) -> None:
        """Add the ``chosen`` (bool) of ``values`` to the rows of their ``classes`` (int64); all are [N, H, W]."""
        bins = self.counts.shape[1]
        places = classes[chosen] * bins + (values[chosen] * bins).long().clamp(0, bins - 1)
        self.counts.view(-1).scatter_add_(0, places, torch.ones_like(places))

    def medians(self) -> Tensor:
        """Return the [C] medians, exact to half a bin; 0 for a class without values.

        Of an even number of values it is the mean of the two middle ones.
        """
        counts = self.counts.cumsum(1)
        total = counts[:, -1:]
        middle = torch.cat([(total - 1) // 2, total // 2], 1).clamp_min(0)
        places = torch.searchsorted(counts, middle, right=True)
        medians = (places.double() + 0.5).mean(1) / self.counts.shape[1]
        return torch.where(total[:, 0] > 0, medians, 0.0)

    def binned_medians(self, floor: float, running_index: bool = False) -> Tensor:
        """Return the [C] medians as PLOP takes them from 100 bins: linear within the bin and at least ``floor``.

        Args:
            floor: smallest median, also that of a class without values.
            running_index: as published, the running count adds a bin's index in place of its content, and three bins
                are never read. Unless a class's bins match by chance, its median becomes infinity or, with few pixels,
                the floor (docs/reference/baselines.md, "PLOP", bugs 1 and 3).
        """
        rows = (_binned_median(row, running_index) for row in self.counts.tolist())
        return torch.tensor([max(median, floor) for median in rows], device=self.counts.device)


def _binned_median(counts: list[int], running_index: bool) -> float:
    bins, half, before = len(counts), sum(counts) / 2, 0.0
    if not half:
        return 0.0
    edge, inside = 0.0, 0
    for k in range(bins):
        edge = k / bins
        inside = counts[int(edge * bins) if running_index else k]
        if before <= half <= before + inside:
            break
        before += edge * bins if running_index else inside
    if not inside:
        return math.copysign(math.inf, half - before)
    return edge + (half - before) / inside / bins


def fill_in_certain(
    labels: Tensor, old_logits: Tensor, uncertainty: Tensor, thresholds: Tensor, old: int
) -> tuple[Tensor, Tensor]:
    """Return PLOP's pseudo-labels (Douillard et al., CVPR 2021, section 3.3).

    Args:
        labels: [N, H, W]; ids below ``old`` are background.
        old_logits: [N, C°, H, W] of a softmax classifier, the previous model's.
        uncertainty: [N, H, W] uncertainty of its predictions.
        thresholds: [C°]; a prediction counts if its uncertainty is below the threshold of its class.
        old: C°.

    Returns:
        [N, H, W] labels, int64 or for int32 labels int32, in which a background pixel has the predicted class if the
        prediction counts and else is ignored; and [N] the share of background pixels whose prediction counts.
    """
    background = labels < old
    predicted = old_logits.argmax(1)
    sure = background & (uncertainty < thresholds.to(uncertainty)[predicted])
    given = signed_ids(labels)
    filled = torch.where(background, torch.where(sure, predicted.to(given.dtype), ignored_id(labels)), given)
    return filled, sure.sum((1, 2)) / (1e-6 + background.sum((1, 2)))
