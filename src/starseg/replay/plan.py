"""The replay plan: how much a step replays (docs/reference/star.md, "The replay plan")."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from starseg.tasks import Setting


@dataclass(frozen=True)
class ReplayPlan:
    """Amounts that a step with K_old old classes replays.

    Attributes:
        per_iteration: [K_old] int64 features replayed in each iteration.
        background_owed: B, background grid cells that the step still owes.
        background_ratio: r, repeat ratio of the batch's own background cells.
        carried: [1 + K_old] counts of background and old classes carried on to the next step.
    """

    per_iteration: Tensor
    background_owed: float
    background_ratio: float
    carried: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """[sum(per_iteration)] int64 class of each replayed feature, counted from 0.

        Cached, because counting these features synchronises with the GPU.
        """
        return torch.repeat_interleave(self.per_iteration)


def make_adapter_plan(
    setting: Setting, stored: Tensor, predicted: Tensor, labelled: Tensor, iterations: int
) -> ReplayPlan:
    """Return Adapter's replay plan, with at least one feature per class (docs/reference/baselines.md, "Adapter").

    Args:
        setting: "overlap" or "disjoint".
        stored: [1 + K_old] counts of background and old classes in the bank.
        predicted: [1 + K_old] grid cells labelled background in this step's images, by the previous model's prediction.
        labelled: [K_new] grid cells of the new classes in this step's images.
        iterations: iterations per epoch.
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


def make_basic_plan(stored: Tensor, predicted: Tensor, iterations: int) -> ReplayPlan:
    """Return the replay plan of STAR-Basic and STAR-Lite, which is the same in either setting.

    It is STAR's plan for "disjoint", except that the counts of the classes are carried on as stored.

    Args:
        stored: [1 + K_old] counts of background and old classes.
        predicted: [1 + K_old] grid cells labelled background in this step's images, by the previous model's prediction.
        iterations: iterations per epoch.
    """
    plan = make_plan("disjoint", stored, predicted, 0, iterations)
    return replace(plan, carried=torch.cat([plan.carried[:1], stored[1:].float()]))


def make_plan(setting: Setting, stored: Tensor, predicted: Tensor, new_classes: int, iterations: int) -> ReplayPlan:
    """Return STAR's replay plan, computed in float32 as published.

    Args:
        setting: "overlap" or "disjoint".
        stored: [1 + K_old] counts of background and old classes in the bank.
        predicted: [1 + K_old] grid cells labelled background in this step's images, by the previous model's prediction.
        new_classes: number of classes that the step adds.
        iterations: iterations per epoch.
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
