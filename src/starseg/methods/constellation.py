"""Constellation: mixtures of Gaussians of a frozen network's features, replayed to one classifier over all classes.

docs/constellation.md has the method in formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from starseg.errors import UserError
from starseg.methods.gaussian_replay import CLASSIFIER, NETWORK, ClassifierOptions, GaussianReplay, classify_cells
from starseg.methods.protocol import Group, Stage, StepContext, register_method
from starseg.methods.recipes import Recipe, Recipes, StepSchedule
from starseg.models import Architecture
from starseg.models.classifiers import BACKGROUND as BACKGROUND_HEAD
from starseg.models.classifiers import HeadLayout
from starseg.replay.gaussians import GaussianBank, fit_mixtures
from starseg.tasks import BACKGROUND, IGNORE

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo

# Cells to which the background's mixture is fitted after step 0.
_MERGED, _AT_ONCE = 100_000, 8192


class ConstellationOptions(ClassifierOptions):
    """Options of constellation."""

    base: Literal["auto", "frozen", "trained"] = "auto"
    """Whether step 0 trains the network: `auto` trains it unless it starts from pretrained weights."""
    maps: int = Field(2, gt=0)
    """Maps of the encoder in the description of a cell, from the deepest."""
    image_mean: bool = True
    """Whether the description has the average of the deepest map over the image."""
    limit: float = Field(2.0, gt=0)
    """Largest root mean square of a cell's features."""
    crops: int = Field(3, gt=0)
    """Augmented crops of each image whose features are computed."""
    draws: int = Field(1024, ge=0)
    """Features replayed in an iteration, over all processes; 0 for no replay."""
    hidden: int = Field(256, ge=0)
    """Units of the classifier's hidden layer; 0 for a linear classifier."""
    warm_start: bool = True
    """Whether a later step starts from the previous classifier's weights."""
    soft_targets: bool = True
    """Whether draws are learnt with the previous classifier's probabilities, not with the classes of their mixtures."""
    refit: bool = True
    """Whether later steps fit the mixture of the background again."""


@register_method("constellation")
class Constellation(GaussianReplay):
    """Mixtures of Gaussians of frozen features, replayed to a classifier over all classes."""

    summary = "frozen features, mixtures of Gaussians per class, one classifier over all classes"
    source = "starseg"
    stores = "the network; a mixture of Gaussians per class"
    freezes = True
    later_schedule = False
    later_options = frozenset({"pseudo", "draws", "replay", "reject", "shift", "refit", "warm_start", "soft_targets"})
    recipes: ClassVar[Recipes] = {
        "voc": Recipe(StepSchedule(60, 1e-3), StepSchedule(60, 1e-4)),
        "ade": Recipe(StepSchedule(100, 2.5e-3), StepSchedule(100, 2.5e-4)),
    }
    Options = ConstellationOptions
    options: ConstellationOptions

    def __init__(self, options: ConstellationOptions) -> None:
        super().__init__(options)
        self.layout = HeadLayout((BACKGROUND_HEAD,), hidden=options.hidden)

    def architecture(self, architecture: Architecture) -> Architecture:
        """Return the architecture with the descriptor as its decoder."""
        fields = type(self.options).model_fields
        given = {key: getattr(self.options, key) for key in ("width", "window", "maps", "image_mean", "limit")}
        # The later ones are left out at their defaults, so that steps of versions without them can be continued.
        options = {k: v for k, v in given.items() if k in ("width", "window") or v != fields[k].default}
        return replace(architecture, decoder="descriptor", options=options)

    def own_stage(self, step: int, pretrained: bool) -> Stage | None:
        """Return the training of the classifier; None for a step 0 that trains the network before it."""
        trained = self.options.base == "trained" or (self.options.base == "auto" and not pretrained)
        return None if step == 0 and trained else self.classifier_stage()

    def stages(self, ctx: StepContext) -> tuple[Stage, ...]:
        """Return the training of the classifier, after that of the network in a step 0 that trains it."""
        own = self.classifier_stage() if ctx.frozen else self.own_stage(ctx.step, ctx.pretrained)
        return (own,) if own else (Stage(NETWORK), self.classifier_stage())

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why constellation cannot continue from a finished step: another network, or no bank of Gaussians."""
        if (reason := super().can_continue(info, state)) is not None:
            return reason
        if not GaussianBank.fits(state):
            return f"it holds no mixtures of Gaussians (trained by {info.method}); take a step trained with {self.name}"
        return None

    def freeze(self, ctx: StepContext) -> None:
        """Freeze the encoder and the descriptor, except while the network is trained."""
        model = ctx.model
        if ctx.stage.name != NETWORK:
            model.freeze_all_but([model.hidden, model.lead, model.heads])

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return the classifier's parameters as one group; while the network is trained, ten times as fast as it."""
        roles, network = ctx.model.roles, ctx.stage.name == NETWORK
        faster = 10.0 if network else 1.0
        groups = [Group("encoder", roles.encoder), Group("descriptor", roles.decoder, faster)] if network else []
        classifier = [("hidden layer", roles.hidden), ("background", roles.lead), ("heads", ctx.model.heads)]
        return groups + [Group(name, module, faster) for name, module in classifier]

    def begin_step(self, ctx: StepContext) -> None:
        """Fit the descriptor in step 0; plan the replay in a later step.

        Raises:
            UserError: there is no bank, or it does not hold the old classes.
        """
        super().begin_step(ctx)
        if ctx.step == 0:
            if ctx.stage.name == CLASSIFIER and not ctx.frozen:
                self._fit_descriptor(ctx)
        elif self.bank is None or len(self.bank) != ctx.old_classes:
            raise UserError(
                f"step {ctx.step}: {self.name} needs the mixtures of {ctx.old_classes} old classes from step "
                f"{ctx.step - 1}; that step was trained by another method or holds another task"
            )
        if ctx.stage.name == CLASSIFIER:
            if ctx.step == 0 or not self.options.warm_start:
                parts = (ctx.model.hidden, ctx.model.lead, ctx.model.heads)
                _reset((layer for part in parts for layer in part.modules()), ctx.generator)
            self._plan(ctx)

    def _replayed(self, ctx: StepContext, drawn: Tensor, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy [n] of drawn features with their targets, and which count [n]."""
        if not self.options.soft_targets:
            return super()._replayed(ctx, drawn, ids, logits)
        with torch.no_grad():
            targets = self._previous(ctx, drawn).softmax(1)
        counted = (ids != IGNORE) & ~self._looks_new(ctx, ids, logits)
        terms = -(targets * logits.log_softmax(1)[:, : ctx.first_new]).sum(1)
        return terms.where(counted, 0), counted

    def end_step(self, ctx: StepContext) -> None:
        """Fit the mixtures of the new classes, and that of the background to both old draws and new cells."""
        new = range(ctx.first_new, ctx.first_new + ctx.new_classes)
        modes, refit = dict.fromkeys(new, self.options.modes), self.bank is None or self.options.refit
        if refit:
            modes = {BACKGROUND: self.options.background_modes} | modes
        background = float(self.bank.counts[0]) * ctx.stage.crops if self.bank and refit else 0.0
        share = min(1.0, _MERGED / max(background, 1.0))
        agreed: list[Tensor] = []
        cells = partial(self._measured, ctx, background, share, agreed)
        fitted, numbers = fit_mixtures(
            cells, modes, self.options.factors, ctx.generator, ctx.all_reduce_sum, ctx.rank, ctx.world
        )
        numbers[0] /= share
        numbers = numbers / ctx.stage.crops
        if self.bank is None:
            self.bank = GaussianBank(**{**fitted.state_dict(), "counts": numbers.float()})
        else:
            old = self.bank.counts.double()
            counts = torch.cat([numbers[:1], old[1:], numbers[1:]] if refit else [old, numbers])
            self.bank = self.bank.replace(fitted, counts)

    def _measured(
        self, ctx: StepContext, background: float, share: float, agreed: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield cells with their labels, then draws of the old background; see :meth:`_agreed`.

        Args:
            ctx: context of the step.
            background: number of cells that the old background stands for.
            share: random share of the background, old and new, that is taken.
            agreed: labels of an earlier pass, which are used again; the first pass fills the empty list.
        """
        for number, (features, labels) in enumerate(self._cells_and_draws(ctx, background, share)):
            if number == len(agreed):
                agreed.append(self._agreed(ctx, features, labels))
            yield features, agreed[number]

    def _cells_and_draws(self, ctx: StepContext, background: float, share: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the cells and draws of :meth:`_measured`, the same in every pass."""
        # The second generator is in the same state in every process.
        choice, generator = (torch.Generator(ctx.device).manual_seed(seed) for seed in (1 + ctx.rank, 0))
        for batch in self._batches(ctx):
            features, labels = self._cells(ctx, batch)
            dropped = torch.rand(labels.shape, generator=choice, device=ctx.device) >= share
            labels = torch.where((labels == BACKGROUND) & dropped, IGNORE, labels)
            yield features, labels
        parts = math.ceil(background * share / _AT_ONCE)
        for _ in range(parts):
            amounts = torch.zeros_like(self.amounts)
            amounts[0] = background * share / parts
            drawn, ids = self._draw(amounts, generator)
            yield drawn, ids

    def _agreed(self, ctx: StepContext, features: Tensor, labels: Tensor) -> Tensor:
        """Return the labels [n], with background ignored where the classifier predicts a class."""
        taken = classify_cells(ctx, ctx.model, features).argmax(1) != BACKGROUND
        return torch.where((labels == BACKGROUND) & taken, IGNORE, labels)

    def replay_counts(self) -> Tensor | None:
        """Return the counts of the bank, [1 + K]; None if there is no bank."""
        return None if self.bank is None else self.bank.counts

    def scale_replay(self, share: float) -> dict[str, Any]:
        """Return the option ``replay`` multiplied by the share."""
        return {"replay": self.options.replay * share}


def _reset(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Initialise 1x1 convolutions as PyTorch does, but from ``generator``."""
    for layer in modules:
        if isinstance(layer, nn.Conv2d):
            bound = layer.in_channels**-0.5
            for parameter in layer.parameters():
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
