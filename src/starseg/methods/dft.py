"""DFT*: the heads of all steps exist from the start; a later step trains its own and future ones (DFT's repository)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from starseg.errors import UserError
from starseg.methods.protocol import StepContext, register_method
from starseg.methods.recipes import Recipe, Recipes, StepSchedule
from starseg.methods.softmax import SoftmaxMethod

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo


@register_method("dft")
class Dft(SoftmaxMethod):
    """One softmax over the heads of all steps, which exist from step 0.

    A step directory holds the heads of the classes seen so far; the heads of future steps are this method's state.
    """

    summary = "one softmax over all steps' heads from the start; later steps train the heads alone"
    source = "DFT* (published code)"
    stores = "the model, the heads of all later steps"
    freezes = True

    recipes: ClassVar[Recipes] = {
        "voc": Recipe(
            StepSchedule(30, 2e-2),
            StepSchedule(30, 5e-4),
            tasks={"19-1": StepSchedule(30, 5e-3), "15-5": StepSchedule(30, 2e-2)},
        ),
        "ade": Recipe(StepSchedule(30, 2e-2), StepSchedule(60, 0.1), tasks={"100-5": StepSchedule(60, 5e-2)}),
    }

    def __init__(self, options: object) -> None:
        super().__init__(options)
        self.future: list[dict[str, Tensor]] = []

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why no further class can be learnt: the heads of all steps are planned at step 0."""
        return f"{self.name} has the heads of all steps from the start, and so learns no class that was not planned"

    def init_heads(self, ctx: StepContext) -> None:
        """Append the heads of future steps, and restore what they and this step's head learnt as negatives.

        Raises:
            UserError: the stored heads do not fit this step and those after it.
        """
        for step in range(ctx.step + 1, len(ctx.task)):
            ctx.model.add_head(len(ctx.task.new(step)))
        if not ctx.step:
            return
        heads = list(ctx.model.heads[ctx.step :])
        if [len(state["bias"]) for state in self.future] != [len(head.get_parameter("bias")) for head in heads]:
            raise UserError(
                f"step {ctx.step}: DFT needs the heads of all later steps from step {ctx.step - 1}; that step was "
                "trained by another method or for another task"
            )
        for head, state in zip(heads, self.future, strict=True):
            head.load_state_dict(state)

    def freeze(self, ctx: StepContext) -> None:
        """After step 0, freeze everything but the heads of this step and of future steps."""
        if ctx.step:
            ctx.model.freeze_all_but(ctx.model.heads[ctx.step :])

    def end_step(self, ctx: StepContext) -> None:
        """Remove the heads of future steps from the model and keep them as this method's state."""
        self.future = [_copy(head) for head in ctx.model.cut_heads(ctx.step + 1)]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the future heads, named ``i.weight`` and ``i.bias`` with i counted from 0."""
        return {f"{i}.{name}": value for i, state in enumerate(self.future) for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the weights of the heads of this step and of future steps."""
        steps = 1 + max((int(name.split(".")[0]) for name in state), default=-1)
        self.future = [{n: state[f"{i}.{n}"] for n in ("weight", "bias")} for i in range(steps)]


def _copy(head: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in head.state_dict().items()}
