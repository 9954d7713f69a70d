"""Fine-tuning: the base loss on the new classes alone; the lower bound."""

from starseg.methods.protocol import Method, register_method


@register_method("finetune")
class FineTune(Method):
    summary = "base loss on the new classes, nothing against forgetting"
    stores = "nothing"
    base_step = "star"
    source = "lower bound"
