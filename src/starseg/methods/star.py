"""STAR: prototype replay, background repeat, OCFM and SAD (NeurIPS 2023; docs/reference/star.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from starseg.data.samples import Batch
from starseg.methods.protocol import Network, StepContext, register_method
from starseg.methods.prototype_replay import PrototypeReplay, ReplayOptions
from starseg.methods.recipes import Recipes
from starseg.models import Output
from starseg.replay.bank import Norms, PrototypeBank
from starseg.replay.statistics import measure

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo


class StarOptions(ReplayOptions):
    """Options of STAR and STAR-M."""

    norm_noise: Norms = "channel"
    """Draw the norm of a replayed feature once per channel (as published) or once per feature vector."""


@register_method("star")
class Star(PrototypeReplay):
    """Prototype replay, background repeat, old-class feature maintenance and similarity-aware discrimination."""

    summary = "prototype replay: about 2 KB per class in place of old images"
    source = "Chen et al., NeurIPS 2023"
    stores = "the previous model, (2 D + 3) floats per class: counts, prototype, noise, norms"
    later_options = PrototypeReplay.later_options | {"norm_noise"}
    Options = StarOptions
    options: StarOptions
    bank: PrototypeBank | None

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why STAR cannot continue from a finished step: other heads, or no prototype bank."""
        if (reason := super().can_continue(info, state)) is not None:
            return reason
        if not PrototypeBank.fits(state):
            return f"it holds no prototype bank (trained by {info.method}); take a step trained with STAR"
        return None

    def replay_counts(self) -> Tensor | None:
        """Return the counts of the prototype bank, [1 + K]; None if there is no bank."""
        return None if self.bank is None else self.bank.counts

    def run_with_replay(self, batch: Batch, new: Network) -> Output:
        """Run the network on a batch and on features drawn from the bank."""
        ctx, bank = self.ctx, self.bank
        assert bank is not None, "begin_step refuses a step without a bank"
        replayed = bank.draw(self.plan.rows, ctx.generator, self.options.norm_noise)[ctx.rank :: ctx.world]
        return new(batch.images, replayed)

    def end_step(self, ctx: StepContext) -> None:
        """Measure the new classes in one pass and append them to the bank."""
        statistics = measure(self.new_cells(ctx), ctx.first_new, ctx.new_classes).reduce(ctx.all_reduce_sum)
        measured = statistics.finish(self.bank, noise_around_row=ctx.choices.noise_around_row)
        self.bank = measured if self.bank is None else self.bank.extend(measured, self.plan.carried)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the prototype bank."""
        return self.bank.state_dict() if self.bank else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the prototype bank."""
        self.bank = PrototypeBank.from_state_dict(state) if state else None


@register_method("star-m")
class StarM(Star):
    """STAR with an exemplar memory."""

    summary = "STAR with an exemplar memory of 50 old images beside the prototypes"
    stores = Star.stores + "; 50 images"
    section = base_step = "star"
    recipes: ClassVar[Recipes] = {key: replace(recipe, memory_size=50) for key, recipe in Star.recipes.items()}
