"""Sums and means over processes, which make a loss equal to that of the global batch.

Numerators and denominators are each summed over processes; the means of single processes are not averaged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AllReduceSum = Callable[[Tensor], Tensor]
"""Differentiable sum of a tensor over processes (:attr:`starseg.methods.StepContext.all_reduce_sum`)."""


def identity(values: Tensor) -> Tensor:
    """Return the sum over a single process, the values themselves."""
    return values


def ratio(total: Tensor, weight: Tensor | int, all_reduce_sum: AllReduceSum = identity) -> tuple[Tensor, Tensor]:
    """Return the mean over all processes, from the sums of this one.

    Args:
        total: [K] sums of this process.
        weight: scalar, the number or the total weight of the entries in these sums.
        all_reduce_sum: sums a tensor over processes.

    Returns:
        [K] total / weight, 0 where the weight is 0; and the weight. Both are those of all processes.
    """
    summed = all_reduce_sum(torch.cat([total, total.new_zeros(1) + weight]))
    weight = summed[-1]
    return summed[:-1] / torch.where(weight > 0, weight, 1), weight


def mean(values: Tensor, all_reduce_sum: AllReduceSum = identity) -> Tensor:
    """Return the scalar mean over all entries of all processes."""
    return ratio(values.sum()[None], values.numel(), all_reduce_sum)[0][0]
