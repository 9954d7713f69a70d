"""Fine-tuning: the base loss on the new classes alone; the lower bound."""

from starseg.methods.protocol import register_method
from starseg.methods.sigmoid import SigmoidMethod


@register_method("finetune")
class FineTune(SigmoidMethod):
    """Base loss on the new classes, with nothing to prevent forgetting."""

    summary = "base loss on the new classes, nothing against forgetting"
    stores = "nothing"
    domains = True
    base_step = "star"
    source = "lower bound"
