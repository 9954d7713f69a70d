"""What the methods of the softmax family share (METHODS, "Three families of code", A): one of its columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from starseg.config import Strict
from starseg.data.samples import Batch
from starseg.losses.distillation import cross_entropy_map
from starseg.losses.reduction import mean
from starseg.losses.star import upsample
from starseg.methods.protocol import Group, Method, Network, Schedule, StepContext, StepSchedule
from starseg.models import Output
from starseg.models.classifiers import SOFTMAX


class Softmax(Method):
    """One softmax over background and classes, everything trained in every step, one learning rate.

    Subclasses say what their loss is in :meth:`terms`; as it stands it is fine-tuning with a softmax.

    Attributes:
        stages: whether :meth:`terms` is given the backbone's maps, which take memory.
    """

    layout = SOFTMAX
    stages = False
    Options = Strict

    def defaults(self, dataset: str, task: str | None = None) -> Schedule:
        epochs = 60 if dataset == "ade" else 30
        return Schedule(StepSchedule(epochs, 1e-2), StepSchedule(epochs, 1e-3), warmup=0.0, pos_weight=1.0)

    def freeze(self, ctx: StepContext) -> None:
        """Nothing, batch norm included."""

    def param_groups(self, ctx: StepContext) -> list[Group]:
        return [Group("all", ctx.model)]

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        previous = old(batch.images, stages=self.stages) if old else None
        return self.terms(batch, new(batch.images, stages=self.stages), previous)

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        """Named losses from the outputs of the new and, after step 0, the previous network."""
        loss = cross_entropy_map(upsample(output.logits, batch.labels), batch.labels)
        return {"ce": mean(loss, self.ctx.all_reduce_sum)}

    def rule(self, published: bool) -> Callable[[Tensor], Tensor]:
        return partial(torch.argmax, dim=1)
