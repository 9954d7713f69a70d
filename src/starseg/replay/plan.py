"""How much is replayed in a step (docs/reference/star.md, "The replay plan")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from starseg.tasks import Setting


@dataclass(frozen=True)
class ReplayPlan:
    """Replay counts of one step with K_old old classes.

    Attributes:
        per_iteration: [K_old] int64 features replayed each iteration.
        background_owed: grid cells of background the step still owes.
        background_ratio: repeat ratio r of the batch's own background cells.
        carried: [1 + K_old] totals of background and old classes carried on to the next step.
    """

    per_iteration: Tensor
    background_owed: float
    background_ratio: float
    carried: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """Class of each replayed feature, [sum(per_iteration)] int64; the first access synchronises with the GPU."""
        return torch.repeat_interleave(self.per_iteration)


def make_adapter_plan(
    setting: Setting, stored: Tensor, predicted: Tensor, labelled: Tensor, iterations: int
) -> ReplayPlan:
    """Adapter's replay plan: at least one feature per class (docs/reference/baselines.md, "Adapter").

    Args:
        setting: see :func:`make_plan`.
        stored: see :func:`make_plan`.
        predicted: see :func:`make_plan`.
        labelled: [K_new] grid cells of the new classes.
        iterations: see :func:`make_plan`.
    """
    stored, predicted = stored.float(), predicted.float()
    plan = make_plan(setting, stored, predicted, len(labelled), iterations)
    owed = plan.background_owed
    if setting == "overlap":
        found = (predicted[1:] / stored[1:].clamp_min(1)).max().clamp_max(1)
        owed -= float(found * labelled.sum())
    ratio = max(0.0, owed / float(predicted[0])) if predicted[0] > 0 else 0.0
    carried = torch.cat([(predicted[0] + plan.background_owed)[None], stored[1:]])
    return ReplayPlan(plan.per_iteration.clamp_min(1), plan.background_owed, ratio, carried)


def make_plan(setting: Setting, stored: Tensor, predicted: Tensor, new_classes: int, iterations: int) -> ReplayPlan:
    """Compute STAR's replay plan, in float32 as published.

    Args:
        setting: "overlap" or "disjoint".
        stored: [1 + K_old] totals of background and old classes from the bank.
        predicted: [1 + K_old] what the old model finds in this step's images on the grid.
        new_classes: how many classes the step adds.
        iterations: an epoch's.
    """
    stored, predicted = stored.float(), predicted.float()
    overlap = setting == "overlap"
    owed = stored[0] * (1 - 0.01 * new_classes) if overlap else stored[0]
    missing = stored[1:] - predicted[1:] if overlap else stored[1:]
    per_iteration = (missing / iterations).long().clamp_min(0)
    if predicted[0] > 0:
        ratio = (owed / predicted[0] - (0.5 if overlap else 0.0)).clamp_min(0)
    else:
        ratio = torch.zeros(())
    background = (0.5 * predicted[0] if overlap else predicted[0]) + owed
    classes = stored[1:] if overlap else stored[1:] + predicted[1:]
    return ReplayPlan(per_iteration, float(owed), float(ratio), torch.cat([background[None], classes]))
