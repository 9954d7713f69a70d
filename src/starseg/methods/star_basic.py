"""STAR-Basic: prototypes with one number of noise (TPAMI 2025; docs/reference/baselines.md, "STAR-Basic")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from starseg.data.samples import Batch
from starseg.losses.reduction import mean
from starseg.methods.protocol import Network, StepContext, register_method
from starseg.methods.prototype_replay import PrototypeReplay, ReplayOptions
from starseg.methods.recipes import Recipe, Recipes, StepSchedule
from starseg.models import Output
from starseg.replay.directions import DirectionBank, Noise
from starseg.replay.plan import ReplayPlan, make_basic_plan
from starseg.replay.statistics import measure, square_angles

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo


class NoiseOptions(ReplayOptions):
    """Options of STAR-Basic and of STAR-Lite."""

    noise: Noise = "dist"
    """Noise of the replayed directions: the distance to the prototype, the angle to it, or a deviation per channel."""


@register_method("star-basic")
class StarBasic(PrototypeReplay):
    """STAR with one number of noise per class and without norms.

    The replayed features have the mean norm of the current batch.
    """

    summary = "STAR with one number of noise per class; replayed features have the norm of the current batch"
    source = "Chen et al., TPAMI 2025"
    stores = "the previous model, (D + 2) floats per class: count, prototype, noise"
    recipes: ClassVar[Recipes] = {
        **PrototypeReplay.recipes,
        "city": Recipe(StepSchedule(60, 5e-3), StepSchedule(60, 5e-4), options={"pos_weight": 4.0}),
    }
    Options = NoiseOptions
    options: NoiseOptions
    bank: DirectionBank | None

    @property
    def _noise_key(self) -> str:
        return f"{self.options.noise}_noise"

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why the method cannot continue from a finished step: other heads, or no prototypes with this noise."""
        if (reason := super().can_continue(info, state)) is not None:
            return reason
        if self._noise_key not in state:
            return f"it holds no prototypes with {self.options.noise} noise (trained by {info.method})"
        return None

    def replay_counts(self) -> Tensor | None:
        """Return the stored counts, [1 + K]; None if there is no bank."""
        return None if self.bank is None else self.bank.counts

    def make_plan(self, ctx: StepContext, stored: Tensor, cells: Tensor) -> ReplayPlan:
        """Return the replay plan, which is the same in either setting."""
        return make_basic_plan(stored, cells[: ctx.first_new], ctx.iterations)

    def run_with_replay(self, batch: Batch, new: Network) -> Output:
        """Run the network on a batch and on directions drawn from the bank, scaled to the mean norm of its features.

        The norm is known only after the network has run. As the classifiers are linear, the logits of the scaled
        features follow from those of the directions and of a zero vector, which are the biases.
        """
        ctx, bank = self.ctx, self.bank
        assert bank is not None, "begin_step refuses a step without a bank"
        drawn = bank.draw(self.plan.rows, ctx.generator, self.options.noise)[ctx.rank :: ctx.world]
        output = new(batch.images, torch.cat([drawn, drawn.new_zeros(1, drawn.shape[1])]))
        assert output.extra_logits is not None
        norm = mean(output.features.detach().float().norm(dim=1), ctx.all_reduce_sum)
        logits, bias = output.extra_logits[:-1].float(), output.extra_logits[-1].float()
        return output._replace(extra_logits=bias + norm * (logits - bias))

    def end_step(self, ctx: StepContext) -> None:
        """Measure the new classes, for noise "angle" in two passes, and append them to the bank."""
        statistics = measure(self.new_cells(ctx), ctx.first_new, ctx.new_classes).reduce(ctx.all_reduce_sum)
        measured = statistics.finish()
        noise = measured.noise
        if self.options.noise == "dist":
            noise = noise.norm(dim=1)
        elif self.options.noise == "angle":
            squares = ctx.all_reduce_sum(square_angles(self.new_cells(ctx), ctx.first_new, measured.prototypes))
            noise = (squares / measured.counts[1:].clamp_min(1)).sqrt().float()
        new = DirectionBank(measured.counts, measured.prototypes, noise)
        self.bank = new if self.bank is None else self.bank.extend(new, self.plan.carried)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the bank; the name of the noise tells its kind."""
        if self.bank is None:
            return {}
        return {self._noise_key if name == "noise" else name: value for name, value in self.bank.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bank; None if the state has no prototypes with this noise."""
        named = {"noise" if name == self._noise_key else name: value for name, value in state.items()}
        self.bank = DirectionBank.from_state_dict(named) if self._noise_key in state else None
