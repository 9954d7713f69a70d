"""Ridge regression over classes from sufficient statistics (docs/reference/baselines.md, "SegACIL").

Shape letters: M feature cells, F features, K classes, and one column for the background.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.ops.labels import ignored_id
from starseg.replay.record import TensorRecord

# Cells whose features are held in float64 at a time.
_CHUNK = 4096


@dataclass
class RidgeStatistics(TensorRecord):
    """Sums over all cells seen so far, from which the classifier follows exactly; float64.

    Attributes:
        products: [F, F] sum of the outer products of the features.
        targets: [F, 1 + K] sum of the features of the background and of each class.
    """

    products: Tensor
    targets: Tensor

    @classmethod
    def zeros(cls, features: int, classes: int, device: torch.device | str = "cpu") -> RidgeStatistics:
        """Return the sums over no cells, for the background and K classes."""
        products = torch.zeros(features, features, dtype=torch.float64, device=device)
        return cls(products, torch.zeros(features, 1 + classes, dtype=torch.float64, device=device))

    @property
    def classes(self) -> int:
        """Number of classes K, without the background."""
        return self.targets.shape[1] - 1

    def extend(self, classes: int) -> RidgeStatistics:
        """Return the statistics with columns for new classes, of which no cell has been seen."""
        return RidgeStatistics(self.products, F.pad(self.targets, (0, classes)))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add cells.

        Args:
            features: [M, F].
            labels: [M] training ids; 255 is left out.
        """
        valid = labels != ignored_id(labels)
        for part, ids in zip(features[valid].split(_CHUNK), labels[valid].long().split(_CHUNK), strict=True):
            values = part.double()
            self.products.addmm_(values.T, values)
            self.targets.index_add_(1, ids, values.T)

    def merge(self, sums: RidgeStatistics, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        """Add the sums that every process has over its own cells; ``all_reduce_sum`` sums a tensor over processes."""
        self.products += all_reduce_sum(sums.products)
        self.targets += all_reduce_sum(sums.targets)

    def solve(self, gamma: float) -> Tensor:
        """Return the classifier [F, 1 + K] that minimises the squared error to one-hot labels plus gamma |W|^2."""
        system = self.products.clone()
        system.diagonal().add_(gamma)
        return torch.cholesky_solve(self.targets, torch.linalg.cholesky(system))
