"""Prototype replay, the common part of STAR, STAR-Basic, STAR-Lite and Adapter (docs/reference/star.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from starseg.data.samples import Batch
from starseg.errors import UserError
from starseg.losses.star import background_cells, mixed_bce, ocfm, sad
from starseg.methods.protocol import Network, StepContext
from starseg.methods.sigmoid import ClassLossOptions, SigmoidMethod
from starseg.models import Output
from starseg.replay.bank import ClassBank
from starseg.replay.memory import MemoryRule
from starseg.replay.plan import ReplayPlan, make_plan
from starseg.replay.statistics import count_cells, old_model_labels, sample_at_stride
from starseg.tasks import BACKGROUND


class ReplayOptions(ClassLossOptions):
    """Options of every method that replays prototypes."""

    mbce: float = Field(1.0, ge=0)
    """Weight of the mixed class loss."""
    ocfm: float = Field(5.0, ge=0)
    """Weight of old-class feature maintenance (OCFM)."""
    sad: float = Field(0.05, ge=0)
    """Weight of similarity-aware discrimination (SAD)."""
    old_threshold: float = 0.5
    """Raw logit above which the previous model's prediction counts in training; in evaluation the threshold is 0."""
    replay: float = Field(1.0, gt=0, le=1)
    """Share of the stored counts that a later step replays; use less than 1 if there are few new images and many old
    ones. The counts carried on to the next step are not scaled."""


class PrototypeReplay(SigmoidMethod):
    """Replayed features and repeated background in the class loss, feature maintenance (OCFM) and SAD.

    Attributes:
        bank: the bank of the old classes in a later step, on the device of the model; at step 0 None.
        plan: replay plan of a later step.
    """

    memory: ClassVar[MemoryRule] = MemoryRule(score=0.9)
    later_options: ClassVar[frozenset[str]] = frozenset({"ocfm", "sad", "old_threshold", "replay"})
    ocfm_epsilon: ClassVar[float] = 0.0
    needs: ClassVar[str] = "prototype bank"
    """What a later step needs from the step before, for messages."""
    Options = ReplayOptions
    options: ReplayOptions
    bank: Any

    def __init__(self, options: ReplayOptions) -> None:
        super().__init__(options)
        self.bank = None
        self.plan: ReplayPlan

    @abstractmethod
    def replay_counts(self) -> Tensor | None:
        """Return the stored counts, [1 + K]; None if nothing is stored."""

    @abstractmethod
    def run_with_replay(self, batch: Batch, new: Network) -> Output:
        """Run the network on a batch and on this process's share of the replayed features."""

    def scale_replay(self, share: float) -> dict[str, Any]:
        """Return the option ``replay`` multiplied by the share."""
        return {"replay": self.options.replay * share}

    def begin_step(self, ctx: StepContext) -> None:
        """Make the replay plan of a later step, in one pass of the previous model over the step's images.

        Raises:
            UserError: nothing is stored of the old classes, or of other classes.
        """
        super().begin_step(ctx)
        if ctx.old_model is None:
            return
        stored = self.replay_counts()
        if stored is None or len(stored) != ctx.first_new:
            raise UserError(
                f"step {ctx.step}: {self.name} needs the {self.needs} of {ctx.old_classes} old classes from step "
                f"{ctx.step - 1}; that step was trained by another method or holds another task"
            )
        stored, cells = stored.to(ctx.device), self.scan_step(ctx)
        whole = self.make_plan(ctx, stored, cells)
        self.plan = replace(self.make_plan(ctx, stored * self.options.replay, cells), carried=whole.carried)

    def scan_step(self, ctx: StepContext) -> Tensor:
        """Count the cells of a later step by training id, [1 + K_old + K_new] int64, and complete :attr:`bank`."""
        ids = ctx.first_new + ctx.new_classes
        cells = torch.zeros(ids, dtype=torch.int64, device=ctx.device)
        for batch in ctx.scan("before"):
            logits = ctx.old_model(batch.images).logits  # type: ignore[misc]
            cells += count_cells(batch.labels, logits, ctx.model.stride, ids, self.options.old_threshold)
        self.bank = self.bank.to(ctx.device)
        return ctx.all_reduce_sum(cells)

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
        return self.terms(batch, self.run_with_replay(batch, new), old(batch.images), self.bank)

    def base_terms(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Return the losses of step 0."""
        return {"mbce": self.options.mbce * self.class_loss(batch, output).sum()}

    def terms(self, batch: Batch, output: Output, previous: Output, bank: ClassBank) -> dict[str, Tensor]:
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

    def new_cells(self, ctx: StepContext) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the features [N, D, h, w] of the trained network and the labels on their grid, in one pass."""
        for batch in ctx.scan("after"):
            yield ctx.model(batch.images).features, sample_at_stride(batch.labels, ctx.model.stride)
