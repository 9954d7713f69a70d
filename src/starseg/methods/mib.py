"""MiB: the background of a step holds old and future classes (Cermelli et al., CVPR 2020)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from starseg.config import Strict
from starseg.data.samples import Batch
from starseg.losses.distillation import unbiased_cross_entropy_map, unbiased_kd
from starseg.losses.reduction import mean
from starseg.losses.star import upsample
from starseg.methods.protocol import StepContext, register_method
from starseg.methods.softmax import SoftmaxMethod
from starseg.models import Output
from starseg.models.classifiers import BACKGROUND, share_background


class BackgroundInit(SoftmaxMethod):
    """The new classes of a later step start with equal shares of the background's probability."""

    def init_heads(self, ctx: StepContext) -> None:
        if ctx.step:
            share_background(ctx.model.lead[BACKGROUND], ctx.model.heads[-1])


class MibOptions(Strict):
    """Options of MiB."""

    kd: float = Field(10.0, ge=0)
    """Weight of the unbiased distillation."""
    alpha: float = Field(1.0, gt=0)
    """Sharpness of the distillation's target."""


@register_method("mib")
class Mib(BackgroundInit):
    """MiB (Cermelli et al., CVPR 2020)."""

    summary = "cross-entropy and distillation that count old and new classes into the background"
    base_step = "lwf"
    source = "Cermelli et al., CVPR 2020"
    Options = MibOptions
    options: MibOptions

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        if previous is None:
            return super().terms(batch, output, previous)
        ctx, options = self.ctx, self.options
        logits, old_logits = (upsample(o.logits, batch.labels) for o in (output, previous))
        loss = unbiased_cross_entropy_map(logits, batch.labels, ctx.first_new)
        return {
            "ce": mean(loss, ctx.all_reduce_sum),
            "kd": options.kd * unbiased_kd(logits, old_logits, options.alpha, ctx.all_reduce_sum),
        }
