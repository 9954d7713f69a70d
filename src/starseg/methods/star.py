"""STAR: prototype replay, background repeat, OCFM and SAD (NeurIPS 2023; docs/reference/star.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from starseg.data.samples import Batch
from starseg.errors import UserError
from starseg.losses.star import background_cells, mixed_bce, ocfm, sad
from starseg.methods.protocol import Network, StepContext, register_method
from starseg.methods.recipes import Recipes
from starseg.methods.sigmoid import ClassLossOptions, SigmoidMethod
from starseg.models import Output
from starseg.replay.bank import Norms, PrototypeBank
from starseg.replay.memory import MemoryRule
from starseg.replay.plan import ReplayPlan, make_plan
from starseg.replay.statistics import count_cells, measure, old_model_labels, sample_at_stride
from starseg.tasks import BACKGROUND

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo


class StarOptions(ClassLossOptions):
    """Options of STAR and STAR-M."""

    mbce: float = Field(1.0, ge=0)
    """Weight of the mixed class loss."""
    ocfm: float = Field(5.0, ge=0)
    """Weight of old-class feature maintenance (OCFM)."""
    sad: float = Field(0.05, ge=0)
    """Weight of similarity-aware discrimination (SAD)."""
    old_threshold: float = 0.5
    """Raw logit above which the previous model's prediction counts in training; in evaluation the threshold is 0."""
    norm_noise: Norms = "channel"
    """Draw the norm of a replayed feature once per channel (as published) or once per feature vector."""
    replay: float = Field(1.0, gt=0, le=1)
    """Share of the stored counts that a later step replays; use less than 1 if there are few new images and many old
    ones. The counts carried on to the next step are not scaled."""


@register_method("star")
class Star(SigmoidMethod):
    """Prototype replay, background repeat, old-class feature maintenance and similarity-aware discrimination."""

    summary = "prototype replay: about 2 KB per class in place of old images"
    source = "Chen et al., NeurIPS 2023"
    stores = "the previous model, (2 D + 3) floats per class: counts, prototype, noise, norms"
    memory: ClassVar[MemoryRule] = MemoryRule(score=0.9)
    later_options: ClassVar[frozenset[str]] = frozenset({"ocfm", "sad", "old_threshold", "norm_noise", "replay"})
    ocfm_epsilon: ClassVar[float] = 0.0
    Options = StarOptions
    options: StarOptions

    def __init__(self, options: StarOptions) -> None:
        super().__init__(options)
        self.bank: PrototypeBank | None = None
        self.plan: ReplayPlan

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why STAR cannot continue from a finished step: other heads, or no prototype bank."""
        if (reason := super().can_continue(info, state)) is not None:
            return reason
        if not PrototypeBank.fits(state):
            return f"it holds no prototype bank (trained by {info.method}); take a step trained with STAR"
        return None

    def replay_counts(self) -> Tensor | None:
        """Return the counts of the prototype bank, [1 + K]; None if there is no bank."""
        return None if self.bank is None else self.bank.counts

    def scale_replay(self, share: float) -> dict[str, Any]:
        """Return the option ``replay`` multiplied by the share."""
        return {"replay": self.options.replay * share}

    def begin_step(self, ctx: StepContext) -> None:
        """Make the replay plan of a later step, in one pass of the previous model over the step's images.

        Raises:
            UserError: there is no prototype bank, or it does not hold the old classes.
        """
        super().begin_step(ctx)
        if ctx.old_model is None:
            return
        if self.bank is None or len(self.bank) != ctx.old_classes:
            raise UserError(
                f"step {ctx.step}: {self.name} needs the prototype bank of {ctx.old_classes} old classes from step "
                f"{ctx.step - 1}; that step was trained by another method or holds another task"
            )
        self.bank = self.bank.to(ctx.device)
        ids, stride, threshold = ctx.first_new + ctx.new_classes, ctx.model.stride, self.options.old_threshold
        cells = torch.zeros(ids, dtype=torch.int64, device=ctx.device)
        for batch in ctx.scan("before"):
            cells += count_cells(batch.labels, ctx.old_model(batch.images).logits, stride, ids, threshold)
        stored, cells = self.bank.counts, ctx.all_reduce_sum(cells)
        whole = self.make_plan(ctx, stored, cells)
        self.plan = replace(self.make_plan(ctx, stored * self.options.replay, cells), carried=whole.carried)

    def make_plan(self, ctx: StepContext, stored: Tensor, cells: Tensor) -> ReplayPlan:
        """Return the replay plan of the step.

        Args:
            ctx: context of the step.
            stored: [1 + K_old] counts of the background and the old classes to replay.
            cells: [1 + K_old + K_new] what :func:`count_cells` found in all images of the step.
        """
        return make_plan(ctx.task.setting, stored, cells[: ctx.first_new], ctx.new_classes, ctx.iterations)

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the losses of the step, for which a later step draws replayed features from the bank."""
        if old is None:
            return self.base_terms(batch, new(batch.images))
        ctx, bank = self.ctx, self.bank
        assert bank is not None, "begin_step refuses a step without a bank"
        replayed = bank.draw(self.plan.rows, ctx.generator, self.options.norm_noise)[ctx.rank :: ctx.world]
        return self.terms(batch, new(batch.images, replayed), old(batch.images), bank)

    def base_terms(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Return the losses of step 0."""
        return {"mbce": self.options.mbce * self.class_loss(batch, output).sum()}

    def terms(self, batch: Batch, output: Output, previous: Output, bank: PrototypeBank) -> dict[str, Tensor]:
        """Return the losses of a later step; ``output.extra_logits`` holds the logits of the replayed features."""
        ctx, options = self.ctx, self.options
        features = output.features.float()
        labels, seen = old_model_labels(batch.labels, previous.logits, features.shape[2:], options.old_threshold)
        stride = labels.shape[-1] // features.shape[-1]
        cells = background_cells(sample_at_stride(labels, stride), sample_at_stride(seen, stride))

        new_logits = output.logits[:, ctx.old_classes :].float()
        extra = new_logits.new_zeros(0, ctx.new_classes)
        if output.extra_logits is not None:
            extra = output.extra_logits[:, ctx.old_classes :].float()
        mbce = mixed_bce(
            self.class_loss(batch, output), extra, new_logits, cells, self.plan.background_ratio, ctx.all_reduce_sum
        )
        region = (labels == BACKGROUND) & (seen > 0)
        choices = ctx.choices
        old_classes = bank.prototypes if choices.absent_prototypes_in_sad else bank.shown
        return {
            "mbce": options.mbce * mbce.sum(),
            "ocfm": options.ocfm
            * ocfm(features, previous.features.float(), region, ctx.all_reduce_sum, self.ocfm_epsilon),
            "sad": options.sad
            * sad(
                features,
                labels,
                ctx.first_new,
                ctx.new_classes,
                old_classes,
                absent_classes=choices.absent_classes_in_sad,
                epsilon=choices.sad_epsilon,
                all_reduce_sum=ctx.all_reduce_sum,
            ),
        }

    def end_step(self, ctx: StepContext) -> None:
        """Measure the new classes in one pass and append them to the bank."""
        cells = (
            (ctx.model(batch.images).features, sample_at_stride(batch.labels, ctx.model.stride))
            for batch in ctx.scan("after")
        )
        statistics = measure(cells, ctx.first_new, ctx.new_classes).reduce(ctx.all_reduce_sum)
        measured = statistics.finish(self.bank, noise_around_row=ctx.choices.noise_around_row)
        self.bank = measured if self.bank is None else self.bank.extend(measured, self.plan.carried)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the prototype bank."""
        return self.bank.state_dict() if self.bank else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the prototype bank."""
        self.bank = PrototypeBank.from_state_dict(state) if state else None


@register_method("star-m")
class StarM(Star):
    """STAR with an exemplar memory."""

    summary = "STAR with an exemplar memory of 50 old images beside the prototypes"
    stores = Star.stores + "; 50 images"
    section = base_step = "star"
    recipes: ClassVar[Recipes] = {key: replace(recipe, memory_size=50) for key, recipe in Star.recipes.items()}
