"""DKD and DKD-M: distillation of logits and of their positive and negative parts (Baek et al., NeurIPS 2022)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from starseg.config import Strict
from starseg.data.samples import Batch
from starseg.losses.distillation import sigmoid_kd, sign_split
from starseg.losses.star import negatives_per_class, upsample
from starseg.methods.protocol import Group, Network, StepContext, register_method
from starseg.methods.recipes import Recipe, Recipes, from_recipe
from starseg.methods.sigmoid import ClassLossOptions, SigmoidMethod
from starseg.models import Output, Segmenter
from starseg.models.classifiers import AUXILIARY, HeadLayout, copy_head
from starseg.replay.memory import MemoryRule


class DkdOptions(ClassLossOptions):
    """Options of DKD and DKD-M."""

    later_pos_weight: float | None = from_recipe(gt=0)
    """Weight of positive pixels after step 0; by default the recipe's value (1 on VOC, 35 on ADE20K), or
    `pos_weight` if that differs from the recipe's value."""
    kd: float = Field(5.0, ge=0)
    """Weight of the distillation of the logits."""
    dkd: float = Field(5.0, ge=0)
    """Weight of the distillation of the logits' positive and negative parts."""


_SIGMOID = SigmoidMethod.recipes


@register_method("dkd")
class Dkd(SigmoidMethod):
    """Distillation of the logits and of their positive and negative parts, with an auxiliary head.

    The auxiliary head is trained towards 0 on every pixel; the head of a new class starts as a copy of it.
    """

    summary = "distillation of logits and of their positive and negative parts; new heads start as an auxiliary one"
    source = "Baek et al., NeurIPS 2022"
    layout = HeadLayout((AUXILIARY,))
    later_options = frozenset({"later_pos_weight", "kd", "dkd"})
    Options = DkdOptions
    options: DkdOptions

    recipes: ClassVar[Recipes] = {
        "voc": replace(_SIGMOID["voc"], options={"pos_weight": 2.0, "later_pos_weight": 1.0}),
        "ade": replace(_SIGMOID["ade"], options={"pos_weight": 35.0, "later_pos_weight": 35.0}),
    }

    @classmethod
    def complete_options(cls, options: Strict, recipe: Recipe | None) -> dict[str, Any]:
        """Fill in the recipe's values; ``later_pos_weight`` follows a ``pos_weight`` that differs from the recipe's."""
        later, values = options.model_dump()["later_pos_weight"], super().complete_options(options, recipe)
        # Configurations saved by version 0.1.0 contain the recipe's value as if the user had given it, so a value equal
        # to the recipe's does not count as given.
        if later is None and (recipe is None or values["pos_weight"] != recipe.options.get("pos_weight")):
            values["later_pos_weight"] = values["pos_weight"]
        return values

    def pos_weight(self, ctx: StepContext) -> float:
        """Return ``later_pos_weight`` after step 0 if it is set, else ``pos_weight``."""
        weight = self.options.later_pos_weight
        return float(weight) if ctx.step and weight is not None else super().pos_weight(ctx)

    def init_heads(self, ctx: StepContext) -> None:
        """After step 0, start every new class as a copy of the auxiliary head."""
        if ctx.step:
            copy_head(ctx.model.lead[AUXILIARY], ctx.model.heads[-1])

    def freeze(self, ctx: StepContext) -> None:
        """After step 0, freeze batch norm and dropout; the old heads keep learning."""
        if ctx.step:
            ctx.model.freeze_norm()

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return groups in which decoder and heads learn ten times as fast as the encoder.

        After step 0, weight decay applies to the new head only.
        """
        roles, decay = ctx.model.roles, not ctx.step
        return [
            Group("encoder", roles.encoder, 1.0, decay),
            Group("decoder", roles.decoder, 10.0, decay),
            Group("auxiliary head", roles.lead, 10.0, decay),
            Group("old heads", roles.old, 10.0, decay),
            Group("new head", roles.new, 10.0),
        ]

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the base loss, the auxiliary head's loss and, after step 0, the distillation terms."""
        output = new(batch.images)
        auxiliary = upsample(output.logits[:, :1], batch.labels)
        terms = {
            "mbce": self.class_loss(batch, output).sum(),
            "ac": negatives_per_class(auxiliary.flatten()[:, None], self.ctx.all_reduce_sum)[0].sum(),
        }
        return terms if old is None else {**terms, **self.distill(batch, output, old(batch.images))}

    def distill(self, batch: Batch, output: Output, previous: Output) -> dict[str, Tensor]:
        """Return the three distillation terms, each summed over the old classes."""
        ctx, options = self.ctx, self.options
        assert ctx.old_model is not None
        old = slice(1, 1 + ctx.old_classes)
        logits, old_logits = (upsample(o.logits[:, old], batch.labels) for o in (output, previous))
        parts = sign_split(output.features.float(), class_weights(ctx.model, ctx.step))
        old_parts = sign_split(previous.features.float(), class_weights(ctx.old_model, ctx.step))
        positive, negative = (sigmoid_kd(a, b, ctx.all_reduce_sum).sum() for a, b in zip(parts, old_parts, strict=True))
        return {
            "kd": options.kd * sigmoid_kd(logits, old_logits, ctx.all_reduce_sum).sum(),
            "dkd+": options.dkd * positive,
            "dkd-": options.dkd * negative,
        }


def class_weights(model: Segmenter, heads: int) -> Tensor:
    """Return the weights [K, D, 1, 1] of a model's first ``heads`` class heads."""
    return torch.cat([head.get_parameter("weight") for head in model.heads[:heads]])


@register_method("dkd-m")
class DkdM(Dkd):
    """DKD with an exemplar memory."""

    summary = "DKD with an exemplar memory"
    stores = "the previous model, 100 images (ADE20K: 300)"
    section = base_step = "dkd"
    memory = MemoryRule(score=0.9)
    recipes: ClassVar[Recipes] = {
        "voc": replace(Dkd.recipes["voc"], memory_size=100),
        "ade": replace(Dkd.recipes["ade"], memory_size=300),
    }
