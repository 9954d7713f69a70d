"""Adapter: STAR with an uncertainty constraint, moving prototypes and its own replay plan (Zhu et al., AAAI 2025)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from starseg.data.samples import Batch
from starseg.losses.star import uncertainty, upsample
from starseg.methods.protocol import StepContext, register_method
from starseg.methods.star import Star, StarOptions
from starseg.models import Output
from starseg.replay.bank import ClassBank
from starseg.replay.drift import Drift
from starseg.replay.plan import ReplayPlan, make_adapter_plan
from starseg.replay.statistics import sample_at_stride


class AdapterOptions(StarOptions):
    """Options of Adapter: those of STAR, its uncertainty-aware constraint and its drift compensation."""

    uac: float = Field(0.1, ge=0)
    """Weight of the uncertainty-aware constraint."""
    adc: bool = True
    """Move the old prototypes with the drift of their features after a step; the published code does not call this."""


@register_method("adapter")
class Adapter(Star):
    """STAR with an uncertainty-aware constraint and prototypes that follow the drift of their features."""

    summary = "STAR with an uncertainty constraint and prototypes that follow the drift of the features"
    source = "Zhu et al., AAAI 2025"
    later_options = Star.later_options | {"adc"}
    ocfm_epsilon = 1e-4
    Options = AdapterOptions
    options: AdapterOptions

    def make_plan(self, ctx: StepContext, stored: Tensor, cells: Tensor) -> ReplayPlan:
        """Return Adapter's replay plan, which also depends on the cells of the new classes."""
        predicted, labelled = cells[: ctx.first_new], cells[ctx.first_new :]
        return make_adapter_plan(ctx.task.setting, stored, predicted, labelled, ctx.iterations)

    def base_terms(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Return STAR's losses of step 0 and the uncertainty-aware constraint."""
        return {**super().base_terms(batch, output), "uac": self.constraint(batch, output)}

    def terms(self, batch: Batch, output: Output, previous: Output, bank: ClassBank) -> dict[str, Tensor]:
        """Return STAR's losses of a later step and the uncertainty-aware constraint."""
        return {**super().terms(batch, output, previous, bank), "uac": self.constraint(batch, output)}

    def constraint(self, batch: Batch, output: Output) -> Tensor:
        """Return the weighted uncertainty-aware constraint on all classes."""
        loss = uncertainty(upsample(output.logits, batch.labels), batch.labels, self.ctx.all_reduce_sum)
        return self.options.uac * loss

    def end_step(self, ctx: StepContext) -> None:
        """Append the new classes to the bank, then compensate the drift of the old prototypes in a second pass."""
        old = self.bank
        super().end_step(ctx)
        if (
            old is None
            or self.bank is None
            or ctx.old_model is None
            or not self.options.adc
            or ctx.choices.fixed_prototypes
        ):
            return
        drift = Drift.zeros(ctx.old_classes, old.prototypes.shape[1], ctx.device)
        for batch in ctx.scan("after"):
            previous, output = ctx.old_model(batch.images), ctx.model(batch.images)
            labels = sample_at_stride(batch.labels, ctx.model.stride)
            drift.update(previous.features, previous.logits, output.features, output.logits, labels)
        self.bank = drift.move(self.bank, old.counts[1:], ctx.all_reduce_sum)
