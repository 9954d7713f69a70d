"""Joint training: all classes in one step; the upper bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from starseg.methods.protocol import register_method
from starseg.methods.sigmoid import SigmoidMethod
from starseg.tasks import TaskSequence

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo


@register_method("joint")
class Joint(SigmoidMethod):
    """Training of all classes in a single step on all images."""

    summary = "all classes at once, with all images"
    stores = "nothing (it sees all images)"
    domains = True
    source = "upper bound"

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why no step can follow: joint training learns all classes in a single one."""
        return "joint training learns all classes in one step, so that there is none to continue from"

    def sequence(self, task: TaskSequence) -> TaskSequence:
        """Return the task with all its classes in one step."""
        return task.at_once()
