"""Joint training: every class in one step; the upper bound."""

from dataclasses import replace

from starseg.methods.protocol import Method, register_method
from starseg.tasks import TaskSequence


@register_method("joint")
class Joint(Method):
    summary = "all classes at once, with all images"
    stores = "nothing (it sees all images)"
    source = "upper bound"

    def sequence(self, task: TaskSequence) -> TaskSequence:
        return replace(task, steps=(task.order,), base=task.base)
