"""SegACIL: a ridge classifier of frozen features in closed form (docs/reference/baselines.md, "SegACIL")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from starseg.config import Choices
from starseg.data.samples import Batch
from starseg.errors import UserError
from starseg.losses.star import bce_per_class
from starseg.methods.protocol import Network, Stage, StepContext, register_method
from starseg.methods.recipes import Recipe, Recipes, StepSchedule
from starseg.methods.sigmoid import ClassLossOptions, SigmoidMethod
from starseg.models import Segmenter
from starseg.models.classifiers import BACKGROUND as BACKGROUND_HEAD
from starseg.models.classifiers import HeadLayout, last_layer, make_head
from starseg.ops.labels import signed_ids
from starseg.replay.ridge import RidgeStatistics
from starseg.replay.statistics import sample_at_stride
from starseg.tasks import BACKGROUND

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo


class SegAcilOptions(ClassLossOptions):
    """Options of SegACIL."""

    width: int = Field(8196, gt=0)
    """Units of the random layer F; F x F numbers in float64 are stored (537 MB by default)."""
    gamma: float = Field(1.0, gt=0)
    """Weight of the penalty on the classifier's weights."""
    uncertainty: float = Field(0.4, ge=0, le=1)
    """Background cells take the previous classifier's prediction where 1 - sigmoid(score) is at most this; 0 for
    none."""


@register_method("segacil")
class SegAcil(SigmoidMethod):
    """Ridge regression on a random expansion of features that are frozen after step 0, solved once per step.

    While step 0 trains the network, its classifier is linear in the features; the random layer and the ridge
    classifier take its place at the end of the step. Later steps train nothing.
    """

    summary = "frozen features, a random layer and a ridge classifier in closed form; one pass per later step"
    source = "Li et al., 2024"
    stores = "the network, F^2 + F (K + 1) float64 numbers: sums of products of F random features"
    recipes: ClassVar[Recipes] = {
        "voc": Recipe(StepSchedule(50, 1e-3), StepSchedule(1, 1e-3), options={"pos_weight": 1.0}),
        "ade": Recipe(StepSchedule(50, 1e-3), StepSchedule(1, 1e-3), options={"pos_weight": 1.0}),
    }
    freezes = True
    later_schedule = False
    later_options = frozenset({"uncertainty"})
    contract_options: ClassVar[Mapping[str, Any]] = {"width": 32}
    Options = SegAcilOptions
    options: SegAcilOptions

    def __init__(self, options: SegAcilOptions) -> None:
        super().__init__(options)
        self.layout = HeadLayout((BACKGROUND_HEAD,), hidden=options.width)
        self.statistics: RidgeStatistics | None = None
        self.random_layer: nn.Sequential | None = None

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why the method cannot continue from a finished step: another network, or no sums of products."""
        if (reason := super().can_continue(info, state)) is not None:
            return reason
        if not RidgeStatistics.fits(state):
            return f"it holds no sums of products (trained by {info.method}); take a step trained with {self.name}"
        return None

    def stages(self, ctx: StepContext) -> tuple[Stage, ...]:
        """Return the training of the network in step 0, unless the network is given."""
        return () if ctx.step or ctx.frozen else super().stages(ctx)

    def init_heads(self, ctx: StepContext) -> None:
        """Keep the random layer for the end of step 0, and put a linear classifier of the features in its place."""
        model = ctx.model
        self.random_layer, model.hidden, model.lead = model.hidden, nn.Sequential(), nn.ModuleDict()
        model.heads[0] = make_head(model.width, ctx.new_classes, conv=False).to(ctx.device)

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the base loss of step 0."""
        ctx = self.ctx
        loss = bce_per_class(
            new(batch.images).logits.float(),
            batch.labels,
            ctx.first_new,
            self.pos_weight(ctx),
            ignored_as_negatives=ctx.choices.ignored_as_negatives,
            all_reduce_sum=ctx.all_reduce_sum,
        )
        return {"bce": loss.sum()}

    def end_step(self, ctx: StepContext) -> None:
        """Add the step's cells to the sums in one pass, and solve for the classifier.

        Raises:
            UserError: there are no sums of products, or not those of the old classes.
        """
        if ctx.step == 0:
            if self.random_layer is not None:
                self._expand(ctx.model, self.random_layer)
            nn.init.zeros_(ctx.model.hidden[0].bias)  # type: ignore[arg-type]
            self.statistics = RidgeStatistics.zeros(self.options.width, 0, ctx.device)
        elif self.statistics is None or self.statistics.classes != ctx.old_classes:
            raise UserError(
                f"step {ctx.step}: {self.name} needs the sums of products of {ctx.old_classes} old classes from step "
                f"{ctx.step - 1}; that step was trained by another method or holds another task"
            )
        ctx.model.requires_grad_(False)
        statistics = self.statistics.to(ctx.device).extend(ctx.new_classes)
        statistics.merge(self._scan(ctx, statistics.classes), ctx.all_reduce_sum)
        set_classifier(ctx.model, statistics.solve(self.options.gamma))
        self.statistics = statistics

    def _expand(self, model: Segmenter, layer: nn.Sequential) -> None:
        """Put the random layer and heads of its width into the network."""
        width = self.options.width
        model.hidden = layer
        model.lead[BACKGROUND_HEAD] = make_head(width, 1, conv=False)
        model.heads[0] = make_head(width, model.classes, conv=False)
        model.to(model.mean.device)

    def _scan(self, ctx: StepContext, classes: int) -> RidgeStatistics:
        """Return the sums over this process's cells of the step."""
        sums = RidgeStatistics.zeros(self.options.width, classes, ctx.device)
        for batch in ctx.scan("after"):
            output = (ctx.old_model or ctx.model)(batch.images)
            labels = sample_at_stride(batch.labels, ctx.model.stride)
            if ctx.old_model is not None:
                labels = pseudo_labels(labels, output.logits, self.options.uncertainty)
            expanded = ctx.model.hidden(output.features)
            sums.update(expanded.movedim(1, -1).flatten(0, 2), labels.flatten())
        return sums

    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the rule that predicts the background or the class with the largest score."""
        return partial(torch.argmax, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the sums of products."""
        return self.statistics.state_dict() if self.statistics else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the sums of products."""
        self.statistics = RidgeStatistics.from_state_dict(state) if RidgeStatistics.fits(state) else None


def pseudo_labels(labels: Tensor, scores: Tensor, uncertainty: float) -> Tensor:
    """Fill confident predictions of the previous classifier into background cells.

    Args:
        labels: [N, h, w] training ids.
        scores: [N, 1 + K, h, w] of the previous classifier, with the background in channel 0.
        uncertainty: largest 1 - sigmoid of the largest score at which the prediction counts.

    Returns:
        [N, h, w] int64.
    """
    best, winner = scores.max(1)
    confident = (labels == BACKGROUND) & (1 - best.sigmoid() <= uncertainty)
    given = signed_ids(labels)
    return torch.where(confident, winner.to(given.dtype), given)


@torch.no_grad()
def set_classifier(model: Segmenter, weight: Tensor) -> None:
    """Write a linear classifier without biases, [F, 1 + K] with the background in column 0, into a network's heads."""
    heads = [model.lead[BACKGROUND_HEAD], *model.heads]
    for head, columns in zip(heads, weight.split([1, *model.head_sizes], dim=1), strict=True):
        layer = last_layer(head)
        layer.weight.copy_(columns.T[:, :, None, None])
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
