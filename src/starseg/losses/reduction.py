"""Sums and means over processes, so that a loss equals that of the global batch.

Numerators and denominators are summed over processes; means are not averaged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllReduceSum = Callable[[Tensor], Tensor]
"""Sums a tensor over processes, differentiably (:attr:`starseg.methods.StepContext.all_reduce_sum`)."""


def identity(values: Tensor) -> Tensor:
    """Return a tensor as it is: the sum over one process."""
    return values


def ratio(total: Tensor, weight: Tensor | int, all_reduce_sum: AllReduceSum = identity) -> tuple[Tensor, Tensor]:
    """Return the ratio of two sums over processes.

    Args:
        total: [K] sums of this process.
        weight: scalar, over how many (or how much) this process summed.
        all_reduce_sum: see above.

    Returns:
        [K] total / weight, 0 where the weight is 0, and the weight, both of all processes.
    """
    summed = all_reduce_sum(torch.cat([total, total.new_zeros(1) + weight]))
    weight = summed[-1]
    return summed[:-1] / torch.where(weight > 0, weight, 1), weight


def mean(values: Tensor, all_reduce_sum: AllReduceSum = identity) -> Tensor:
    """Return the mean over all entries of all processes."""
    return ratio(values.sum()[None], values.numel(), all_reduce_sum)[0][0]
