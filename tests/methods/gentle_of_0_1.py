from pydantic import Field
from torch import Tensor

from starseg import Method, register_method
from starseg.contract import check_method
from starseg.data.step import Batch
from starseg.distill import sigmoid_kd
from starseg.losses import upsample
from starseg.methods.base import ClassLossOptions, Network, StepContext


class GentleOptions(ClassLossOptions):
    kd: float = Field(5.0, ge=0)
    """Weight of the distillation."""


@register_method("gentle")
class Gentle(Method):
    summary = "the base loss, and the old classes' probabilities kept"
    source = "docs/new-method.md"
    Options = GentleOptions

    def freeze(self, ctx: StepContext) -> None:
        if ctx.step:
            ctx.model.freeze_norm()

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        output = new(batch.images)
        terms = {"bce": self.class_loss(batch, output).sum()}
        if old is not None:
            known = slice(0, self.ctx.old_classes)
            outputs = (output, old(batch.images))
            logits, old_logits = (upsample(o.logits[:, known], batch.labels) for o in outputs)
            terms["kd"] = self.options.kd * sigmoid_kd(logits, old_logits, self.ctx.add_up).sum()
        return terms


if __name__ == "__main__":
    check_method("gentle")
