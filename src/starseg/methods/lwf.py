"""LwF: learning without forgetting (Li and Hoiem, ECCV 2016), for segmentation as in MiB's code."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from starseg.config import Strict
from starseg.data.samples import Batch
from starseg.losses.distillation import softmax_kd
from starseg.losses.star import upsample
from starseg.methods.protocol import register_method
from starseg.methods.softmax import SoftmaxMethod
from starseg.models import Output


class LwfOptions(Strict):
    """Options of LwF."""

    kd: float = Field(100.0, ge=0)
    """Weight of the distillation; 0 gives fine-tuning with a softmax."""
    alpha: float = Field(1.0, gt=0)
    """Factor on the previous model's logits in the distillation target; a larger one makes it sharper."""


@register_method("lwf")
class Lwf(SoftmaxMethod):
    """Cross-entropy and softmax distillation of the previous model's probabilities."""

    summary = "softmax distillation of the previous model's probabilities"
    source = "Li and Hoiem, ECCV 2016"
    domains = True
    Options = LwfOptions
    options: LwfOptions

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        """Return the cross-entropy and, after step 0, the distillation."""
        terms = super().terms(batch, output, previous)
        if previous is not None:
            logits, old_logits = (upsample(o.logits, batch.labels) for o in (output, previous))
            terms["kd"] = self.options.kd * softmax_kd(logits, old_logits, self.options.alpha, self.ctx.all_reduce_sum)
        return terms
