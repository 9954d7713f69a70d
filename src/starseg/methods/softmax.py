"""Softmax methods (docs/reference/baselines.md): background and classes share one softmax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from starseg.config import Choices
from starseg.data.samples import Batch
from starseg.losses.distillation import cross_entropy_map
from starseg.losses.reduction import mean
from starseg.losses.star import upsample
from starseg.methods.protocol import Group, Method, Network, StepContext
from starseg.methods.recipes import Recipe, Recipes, StepSchedule
from starseg.models import Output
from starseg.models.classifiers import SOFTMAX
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)


class SoftmaxMethod(Method):
    """Base class of softmax methods, which train every parameter in every step with one learning rate.

    Subclasses define their losses in :meth:`terms`; without overrides this is fine-tuning with a softmax.

    Attributes:
        maps: whether :meth:`terms` receives the encoder's maps, which take memory.
    """

    layout = SOFTMAX
    maps = False
    recipes: ClassVar[Recipes] = {
        "voc": Recipe(StepSchedule(30, 1e-2), StepSchedule(30, 1e-3)),
        "ade": Recipe(StepSchedule(60, 1e-2), StepSchedule(60, 1e-3)),
        "city_domain": Recipe(StepSchedule(50, 1e-2), StepSchedule(50, 1e-3)),
    }

    def freeze(self, ctx: StepContext) -> None:
        """Freeze nothing, not even batch norm."""

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return a single group with all parameters."""
        return [Group("all", ctx.model)]

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Run both models on the batch and return the losses of :meth:`terms`."""
        previous = old(batch.images, maps=self.maps) if old else None
        return self.terms(batch, new(batch.images, maps=self.maps), previous)

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        """Return named losses from the outputs of the new model and, after step 0, of the previous model."""
        loss = cross_entropy_map(upsample(output.logits, batch.labels), batch.labels)
        return {"ce": mean(loss, self.ctx.all_reduce_sum)}

    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the rule that predicts the channel with the largest logit."""
        return partial(torch.argmax, dim=1)
