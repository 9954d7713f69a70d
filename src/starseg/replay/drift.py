"""Adapter's drift compensation of old prototypes (docs/reference/baselines.md, "Adapter")."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.losses.reduction import AllReduceSum
from starseg.losses.star import top_two
from starseg.replay.bank import PrototypeBank
from starseg.tasks import BACKGROUND

_CERTAIN = 0.7


@dataclass
class Drift:
    """Sums over cells in which both models confidently predict the same old class, K classes, D channels.

    Attributes:
        cells: [K] float64.
        old, new: [K, D] float64 sums of the normalised features before and after the step.
    """

    cells: Tensor
    old: Tensor
    new: Tensor

    @classmethod
    def zeros(cls, classes: int, channels: int, device: torch.device) -> Drift:
        """Create empty sums."""
        sums = torch.zeros(2, classes, channels, dtype=torch.float64, device=device)
        return cls(torch.zeros(classes, dtype=torch.float64, device=device), sums[0], sums[1])

    def update(
        self, old_features: Tensor, old_logits: Tensor, features: Tensor, logits: Tensor, labels: Tensor
    ) -> None:
        """Add a batch: features [N, D, h, w], logits [N, K, h, w] and [N, K + new, h, w], labels [N, h, w]."""
        best, second, winner = top_two(old_logits.float())
        new_best, new_second, new_winner = top_two(logits.float())
        certain = (best - second > _CERTAIN) & (new_best - new_second > _CERTAIN)
        chosen = certain & (winner == new_winner) & (labels == BACKGROUND)
        rows = winner[chosen]
        self.cells += torch.bincount(rows, minlength=len(self.cells))
        for total, maps in ((self.old, old_features), (self.new, features)):
            total.index_add_(0, rows, F.normalize(maps.movedim(1, -1)[chosen].double(), dim=1))

    def move(self, bank: PrototypeBank, counts: Tensor, all_reduce_sum: AllReduceSum) -> PrototypeBank:
        """Return the bank with the prototypes of its first K classes moved and their noise increased accordingly.

        Args:
            bank: of K classes or more.
            counts: [K] stored cells of the old classes.
            all_reduce_sum: over processes.
        """
        both = Drift(*(all_reduce_sum(getattr(self, f.name)) for f in fields(self)))
        shift = F.normalize(both.new, dim=1) - F.normalize(both.old, dim=1)
        moved = ((both.cells / counts.clamp_min(1))[:, None] * shift).float()
        still = torch.zeros_like(bank.prototypes[len(moved) :])
        moved = torch.cat([moved, still])
        return replace(bank, prototypes=bank.prototypes + moved, noise=bank.noise + moved.abs())
