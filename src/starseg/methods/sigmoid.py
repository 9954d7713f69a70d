"""Sigmoid methods: one binary classifier per class, no background channel, batch norm frozen after step 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from starseg.config import Choices, Strict
from starseg.data.samples import Batch
from starseg.losses.star import bce_per_class
from starseg.methods.protocol import Group, Method, Network, StepContext
from starseg.methods.recipes import Recipe, Recipes, StepSchedule, from_recipe
from starseg.models import Output
from starseg.models.prediction import LargestLogit


class ClassLossOptions(Strict):
    """Options of every method that uses the base loss."""

    pos_weight: float | None = from_recipe(gt=0)
    """Weight of positive pixels; by default the recipe's value (STAR: 4 on VOC, 30 on ADE20K)."""


class SigmoidMethod(Method):
    """Base class of sigmoid methods; without overrides it trains the new classes with the base loss alone."""

    Options: ClassVar[type[Strict]] = ClassLossOptions
    recipes: ClassVar[Recipes] = {
        "voc": Recipe(StepSchedule(60, 1e-3), StepSchedule(60, 1e-4), options={"pos_weight": 4.0}),
        "ade": Recipe(StepSchedule(100, 2.5e-3), StepSchedule(100, 2.5e-4), warmup=0.2, options={"pos_weight": 30.0}),
    }

    def freeze(self, ctx: StepContext) -> None:
        """After step 0, freeze batch norm, dropout and the old heads.

        The old heads stay trainable with :attr:`Choices.train_old_heads <starseg.config.Choices>`.
        """
        if ctx.step:
            ctx.model.freeze_norm()
            if not ctx.choices.train_old_heads:
                ctx.model.heads[:-1].requires_grad_(False)

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return groups in which decoder and heads learn ten times as fast as the encoder.

        After step 0, a new head learns 100 times as fast.
        """
        roles = ctx.model.roles
        newest = 100.0 if ctx.step and ctx.task.added(ctx.step) else 10.0
        return [
            Group("encoder", roles.encoder),
            Group("decoder", roles.decoder, 10.0),
            Group("old heads", roles.old, 10.0),
            Group("new head", roles.new, newest),
        ]

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the base loss, summed over the new classes."""
        return {"bce": self.class_loss(batch, new(batch.images)).sum()}

    def class_loss(self, batch: Batch, output: Output) -> Tensor:
        """Return the base loss of each new class, [K_new]."""
        ctx = self.ctx
        new = output.logits[:, len(self.layout.lead) + ctx.old_classes :]
        return bce_per_class(
            new.float(),
            batch.labels,
            ctx.first_new,
            self.pos_weight(ctx),
            ignored_as_negatives=ctx.choices.ignored_as_negatives,
            all_reduce_sum=ctx.all_reduce_sum,
        )

    def pos_weight(self, ctx: StepContext) -> float:
        """Return the weight of positive pixels in the base loss."""
        weight = self.options.pos_weight
        assert weight is not None, "filled in by apply_recipe"
        return float(weight)

    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the rule that predicts the class of the largest logit where it exceeds 0, else background."""
        return LargestLogit(choices.argmax_of_sigmoids, len(self.layout.lead))
