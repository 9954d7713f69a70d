"""MiB: the background of a step contains old and future classes (Cermelli et al., CVPR 2020)."""

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
    """Softmax method whose new classes start with equal shares of the background's probability."""

    def init_heads(self, ctx: StepContext) -> None:
        """After step 0, initialise the new head from the background's."""
        if ctx.step:
            share_background(ctx.model.lead[BACKGROUND], ctx.model.heads[-1])


class MibOptions(Strict):
    """Options of MiB."""

    kd: float = Field(10.0, ge=0)
    """Weight of the unbiased distillation."""
    alpha: float = Field(1.0, gt=0)
    """Factor on the previous model's logits in the distillation target; a larger one makes it sharper."""


@register_method("mib")
class Mib(BackgroundInit):
    """Unbiased cross-entropy and unbiased distillation.

    Old classes count as background in the cross-entropy, new classes in the distillation.
    """

    summary = "cross-entropy and distillation that count old and new classes into the background"
    base_step = "lwf"
    source = "Cermelli et al., CVPR 2020"
    domains = True
    Options = MibOptions
    options: MibOptions

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        """Return the unbiased cross-entropy and distillation, or at step 0 the plain cross-entropy."""
        if previous is None:
            return super().terms(batch, output, previous)
        ctx, options = self.ctx, self.options
        logits, old_logits = (upsample(o.logits, batch.labels) for o in (output, previous))
        loss = unbiased_cross_entropy_map(logits, batch.labels, ctx.first_new)
        return {
            "ce": mean(loss, ctx.all_reduce_sum),
            "kd": options.kd * unbiased_kd(logits, old_logits, options.alpha, ctx.all_reduce_sum),
        }
