"""STAR-Lite: prototypes derived from the classifier (TPAMI 2025; docs/reference/baselines.md, "STAR-Lite")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from starseg.data.samples import Batch
from starseg.errors import UserError
from starseg.methods.protocol import StepContext, register_method
from starseg.methods.sigmoid import SigmoidMethod
from starseg.methods.star_basic import StarBasic
from starseg.models import Segmenter
from starseg.models.classifiers import linear_classifier
from starseg.replay.derivation import combine, derive_prototypes, iterate_adamw, noise_of_prototypes
from starseg.replay.directions import DirectionBank
from starseg.replay.statistics import FeatureStatistics, count_ids, count_step, grid_predictions, sample_at_stride

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo


@register_method("star-lite")
class StarLite(StarBasic):
    """STAR-Basic without stored prototypes, which are derived from the classifier when a step begins."""

    summary = "STAR-Basic with prototypes derived from the classifier: one number stored per class"
    stores = "the previous model, 1 float per class: count"
    base_step = "star"
    later_options = StarBasic.later_options | {"noise"}
    needs: ClassVar[str] = "counts"

    counts: Tensor | None = None
    new_counts: Tensor
    given: DirectionBank | None = None
    """Prototypes with which the next step begins instead of deriving them."""

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why the method cannot continue from a finished step: other heads, or no counts of its classes."""
        if (reason := SigmoidMethod.can_continue(self, info, state)) is not None:
            return reason
        if "counts" not in state:
            return f"it holds no counts of its classes (trained by {info.method}); take a step trained with STAR"
        return None

    def replay_counts(self) -> Tensor | None:
        """Return the stored counts, [1 + K]; None if nothing is stored."""
        return self.counts

    def begin_step(self, ctx: StepContext) -> None:
        """Derive the prototypes of a later step and make its replay plan, or count the cells of step 0, in one pass."""
        super().begin_step(ctx)
        if ctx.old_model is None:
            counts = torch.zeros(1 + ctx.new_classes, dtype=torch.int64, device=ctx.device)
            for batch in ctx.scan("before"):
                counts += count_ids(sample_at_stride(batch.labels, ctx.model.stride), len(counts))
            self.new_counts = ctx.all_reduce_sum(counts)

    def scan_step(self, ctx: StepContext) -> Tensor:
        """Count the cells of a later step, and derive the bank from the classifier and from the features seen.

        Raises:
            UserError: the prototypes that were given have another shape.
        """
        assert ctx.old_model is not None and self.counts is not None
        ids, counts = ctx.first_new + ctx.new_classes, self.counts.to(ctx.device)
        cells = torch.zeros(ids, dtype=torch.int64, device=ctx.device)
        seen = FeatureStatistics.zeros(ctx.old_classes, ctx.model.width, ctx.device)
        for batch in ctx.scan("before"):
            cells += self._observe(ctx, ctx.old_model, batch, seen, ids)
        self.bank = self.given.to(ctx.device) if self.given is not None else self._derive(ctx, counts, seen)
        if (shape := tuple(self.bank.prototypes.shape)) != (wanted := (ctx.old_classes, ctx.model.width)):
            raise UserError(
                f"step {ctx.step}: expected prototypes of shape {wanted} (old classes, feature channels), got {shape}; "
                "derive them again"
            )
        cells = ctx.all_reduce_sum(cells)
        self.new_counts = torch.cat([cells[:1], cells[ctx.first_new :]])
        return cells

    def _derive(self, ctx: StepContext, counts: Tensor, seen: FeatureStatistics) -> DirectionBank:
        """Return the bank that follows from the classifier and from the features seen."""
        assert ctx.old_model is not None
        weight, bias = linear_classifier(ctx.old_model.heads)
        solve = iterate_adamw if ctx.choices.iterated_prototypes else derive_prototypes
        derived = solve(weight, bias).to(ctx.device)
        prototypes = combine(derived, ctx.all_reduce_sum(seen.unit_sum))
        return DirectionBank(counts, prototypes, noise_of_prototypes(prototypes, self.options.noise))

    def _observe(self, ctx: StepContext, old: Segmenter, batch: Batch, seen: FeatureStatistics, ids: int) -> Tensor:
        """Add a batch's features to the statistics of the classes predicted, and return its counts."""
        output = old(batch.images)
        labels, predicted = grid_predictions(batch.labels, output.logits, ctx.model.stride, self.options.old_threshold)
        seen.update(output.features, predicted)
        return count_step(labels, predicted, ids)

    def end_step(self, ctx: StepContext) -> None:
        """Append the counts of the new classes."""
        new = self.new_counts.float()
        self.counts = new if ctx.old_model is None else torch.cat([self.plan.carried.to(new), new[1:]])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counts."""
        return {} if self.counts is None else {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the counts, also from the state of STAR and STAR-Basic."""
        self.counts = state["counts"].clone() if "counts" in state else None
