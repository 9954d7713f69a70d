"""Constellation: mixtures of Gaussians of a frozen network's features, replayed to one classifier over all classes.

docs/constellation.md has the method in formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from starseg.config import Choices, Strict
from starseg.data.samples import FEATURES, Batch
from starseg.errors import UserError
from starseg.methods.protocol import Group, Method, Network, Stage, StepContext, register_method
from starseg.methods.recipes import Recipe, Recipes, StepSchedule
from starseg.models import Architecture
from starseg.models.classifiers import BACKGROUND as BACKGROUND_HEAD
from starseg.models.classifiers import HeadLayout
from starseg.models.decoders import Descriptor
from starseg.replay.gaussians import GaussianBank, fit_mixtures
from starseg.replay.statistics import count_ids, sample_at_stride
from starseg.tasks import BACKGROUND, IGNORE

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo

# Cells from which the descriptor's statistics are computed.
_STATISTICS = 50_000
# Cells to which the background's mixture is fitted after step 0.
_MERGED, _AT_ONCE = 100_000, 8192
NETWORK, CLASSIFIER = "network", "classifier"


class ConstellationOptions(Strict):
    """Options of constellation."""

    base: Literal["auto", "frozen", "trained"] = "auto"
    """Whether step 0 trains the network: `auto` trains it unless it starts from pretrained weights."""
    epochs: int = Field(6, gt=0)
    """Epochs of the classifier over the computed features."""
    lr: float = Field(0.1, gt=0)
    """Learning rate of the classifier."""
    crops: int = Field(4, gt=0)
    """Augmented crops of each image whose features are computed."""
    maps: int = Field(2, gt=0)
    """Maps of the encoder in the description of a cell, from the deepest."""
    window: int = Field(5, ge=0)
    """Side of the window, in cells, over which the deepest map is averaged, an odd number; 0 for no such average."""
    image_mean: bool = True
    """Whether the description has the average of the deepest map over the image."""
    width: int = Field(256, gt=0)
    """Feature channels after the projection."""
    floor: float = Field(0.015, ge=0)
    """Share of the total variance up to which components keep their relative variances; those above get the same."""
    limit: float = Field(2.0, gt=0)
    """Largest root mean square of a cell's features."""
    hidden: int = Field(256, ge=0)
    """Units of the classifier's hidden layer; 0 for a linear classifier."""
    warm_start: bool = True
    """Whether a later step starts from the previous classifier's weights."""
    modes: int = Field(8, gt=0)
    """Gaussians of a class."""
    background_modes: int = Field(16, gt=0)
    """Gaussians of the background."""
    factors: int = Field(4, ge=0)
    """Factors of the covariance of a Gaussian, beside its diagonal."""
    pseudo: float = Field(0.5, ge=0, le=1)
    """Probability from which a prediction of the previous classifier labels a background pixel."""
    balance: float = Field(0.2, ge=0, le=1)
    """Exponent of the inverse frequency by which classes are weighted: 0 for none, 1 for equal weights."""
    draws: int = Field(2048, ge=0)
    """Features replayed in an iteration, over all processes; 0 for no replay."""
    replay: float = Field(1.0, gt=0, le=1)
    """Share of the stored counts that a later step replays. The counts carried on to the next step are not scaled."""
    reject: bool = True
    """Whether draws are left out that the previous classifier takes for another class."""
    shift: float = Field(0.2, ge=0, le=1)
    """Probability of the new classes above which replayed background is left out; 1 for none."""
    refit: bool = True
    """Whether later steps fit the mixture of the background again."""

    @field_validator("window")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value and not value % 2:
            raise ValueError("expected an odd number, or 0")
        return value


@register_method("constellation")
class Constellation(Method):
    """Mixtures of Gaussians of frozen features, replayed to a classifier over all classes."""

    summary = "frozen features, mixtures of Gaussians per class, one classifier over all classes"
    source = "starseg"
    stores = "the network; a mixture of Gaussians per class"
    later_options = frozenset({"pseudo", "draws", "replay", "reject", "shift", "refit", "warm_start"})
    recipes: ClassVar[Recipes] = {
        "voc": Recipe(StepSchedule(60, 1e-3), StepSchedule(60, 1e-4)),
        "ade": Recipe(StepSchedule(100, 2.5e-3), StepSchedule(100, 2.5e-4)),
    }
    Options = ConstellationOptions
    options: ConstellationOptions

    def __init__(self, options: ConstellationOptions) -> None:
        super().__init__(options)
        self.layout = HeadLayout((BACKGROUND_HEAD,), hidden=options.hidden)
        self.bank: GaussianBank | None = None
        self.amounts: Tensor
        self.draw_weights: Tensor
        self.draw_size: int | None = None
        self.class_weights: Tensor

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
        return None if step == 0 and trained else self._classifier_stage()

    def stages(self, ctx: StepContext) -> tuple[Stage, ...]:
        """Return the training of the classifier, after that of the network in a step 0 that trains it."""
        own = self.own_stage(ctx.step, ctx.pretrained)
        return (own,) if own else (Stage(NETWORK), self._classifier_stage())

    def _classifier_stage(self) -> Stage:
        return Stage(CLASSIFIER, StepSchedule(self.options.epochs, self.options.lr), self.options.crops)

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
            if ctx.stage.name == CLASSIFIER:
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

    def _fit_descriptor(self, ctx: StepContext) -> None:
        """Fit the descriptor to the mean and covariance of raw descriptions, over all processes."""
        decoder = ctx.model.decoder
        assert isinstance(decoder, Descriptor)
        shift: Tensor | None = None
        sums: list[Tensor] = []
        cells = 0
        for batch in ctx.scan("before"):
            output = ctx.model(batch.images, maps=True)
            raw = decoder.raw(output.maps, output.features.shape[2:]).movedim(1, -1).flatten(0, 2).float()
            if shift is None:  # Keeps the sums of products accurate in single precision.
                shift = ctx.all_reduce_sum(raw.mean(0)) / ctx.world
            raw = raw - shift
            found = (torch.ones_like(raw[:, 0]).sum(), raw.sum(0), raw.T @ raw)
            sums = [part.double() + (sums[i] if sums else 0) for i, part in enumerate(found)]
            cells += len(raw)
            if cells * ctx.world >= _STATISTICS:
                break
        assert shift is not None, "a step has at least one image"
        count, total, products = (ctx.all_reduce_sum(part) for part in sums)
        mean = total / count
        covariance = products / count - mean[:, None] * mean
        decoder.fit(shift.double() + mean, covariance, self.options.floor)

    def _plan(self, ctx: StepContext) -> None:
        """Count the cells of each class in the images, and compute what is missing of the old classes."""
        classes = ctx.first_new + ctx.new_classes
        found = torch.zeros(classes, dtype=torch.float64, device=ctx.device)
        for batch in self._batches(ctx):
            features, labels = self._cells(ctx, batch)
            found += count_ids(self._labels(ctx, features, labels), classes)
        found = ctx.all_reduce_sum(found) / ctx.stage.crops
        per_pass = ctx.iterations / ctx.stage.crops
        totals = found.clone()
        if self.bank:
            self.bank = self.bank.to(ctx.device)
            missing = self.bank.counts.double() * self.options.replay
            if ctx.task.setting == "overlap":
                missing[1:] -= found[1 : ctx.first_new]
            missing = missing.clamp_min(0)
            owed = (missing / per_pass).float()
            self.amounts = self.options.draws * owed.sqrt() / owed.sqrt().sum().clamp_min(1e-12)
            self.draw_weights = owed / self.amounts.clamp_min(1e-12)
            if ctx.device.type == "cuda":  # a fixed size, as a random one would make every iteration wait for the GPU
                self.draw_size = self.options.draws + len(self.bank.owners)
            totals[: ctx.first_new] += missing
        share = totals.clamp_min(1) / totals.sum()
        self.class_weights = share.pow(-self.options.balance).float()

    def _batches(self, ctx: StepContext) -> Iterator[Batch]:
        return ctx.cached() if ctx.cached else ctx.scan("crop 0")

    def _cells(self, ctx: StepContext, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the features [n, D] of a batch and their labels [n]."""
        if (features := batch.extras.get(FEATURES)) is not None:
            labels = batch.labels
        else:
            with torch.no_grad():
                features = ctx.model(batch.images).features
            labels = sample_at_stride(batch.labels, ctx.model.stride)
        return features.float().movedim(1, -1).flatten(0, -2), labels.flatten().long()

    @torch.no_grad()
    def _labels(self, ctx: StepContext, features: Tensor, labels: Tensor) -> Tensor:
        """Return the labels [n], with the previous classifier's confident predictions for background cells."""
        if ctx.old_model is None:
            return labels
        chance, winner = _classify(ctx.old_model.classify, features).softmax(1).max(1)
        seen = torch.where(chance > self.options.pseudo, winner, IGNORE)
        return torch.where(labels == BACKGROUND, seen, labels)

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the cross-entropy of the batch's cells, and in a later step of replayed features."""
        ctx = self.ctx
        if ctx.stage.name == NETWORK:
            output = new(batch.images)
            labels = sample_at_stride(batch.labels, ctx.model.stride).flatten().long()
            logits = output.logits.float().movedim(1, -1).flatten(0, -2)
            return {"ce": self._cross_entropy(logits, labels, torch.ones_like(logits[:, 0]))}
        drawn, ids = self._draw(self.amounts, ctx.generator, self.draw_size) if ctx.old_model else (None, batch.labels)
        features, labels = self._cells(ctx, batch)
        output = new(batch.images, drawn, features=features.T[None, :, :, None])
        logits = output.logits.float()[0, :, :, 0].T
        labels = self._labels(ctx, features, labels)
        weights = self.class_weights[labels.where(labels != IGNORE, 0)]
        if output.extra_logits is not None and drawn is not None:
            extra = output.extra_logits.float()
            drawn_weights = self.draw_weights * self.class_weights[: ctx.first_new]
            weights = torch.cat([weights, drawn_weights[ids.where(ids != IGNORE, 0)]])
            logits, labels = torch.cat([logits, extra]), torch.cat([labels, self._plausible(ctx, drawn, ids, extra)])
        return {"ce": self._cross_entropy(logits, labels, weights)}

    @torch.no_grad()
    def _plausible(self, ctx: StepContext, drawn: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
        """Return the ids [n] of drawn features, ignored where the class is doubtful.

        Args:
            ctx: context of the step.
            drawn: [n, D].
            ids: [n] class from whose mixture each was drawn, 255 in rows without a feature.
            logits: [n, C] of the classifier that is being trained.
        """
        assert ctx.old_model is not None, "only a later step draws features"
        left_out = (logits.softmax(1)[:, ctx.first_new :].sum(1) > self.options.shift) & (ids == BACKGROUND)
        if self.options.reject:
            left_out |= _classify(ctx.old_model.classify, drawn).argmax(1) != ids
        return torch.where(left_out, IGNORE, ids)

    def _draw(self, amounts: Tensor, generator: torch.Generator, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw features from the bank and return this process's share."""
        assert self.bank is not None, "begin_step refuses a later step without a bank"
        features, ids = self.bank.draw(amounts, generator, size)
        return features[self.ctx.rank :: self.ctx.world], ids[self.ctx.rank :: self.ctx.world]

    def _cross_entropy(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean cross-entropy over all processes."""
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none") @ weights
        counted = weights @ (labels != IGNORE).float()
        return self.ctx.all_reduce_sum(loss) / self.ctx.all_reduce_sum(counted).clamp_min(1e-12)

    def end_step(self, ctx: StepContext) -> None:
        """Fit the mixtures of the new classes, and that of the background to both old draws and new cells."""
        new = range(ctx.first_new, ctx.first_new + ctx.new_classes)
        modes, refit = dict.fromkeys(new, self.options.modes), self.bank is None or self.options.refit
        if refit:
            modes = {BACKGROUND: self.options.background_modes} | modes
        background = float(self.bank.counts[0]) * ctx.stage.crops if self.bank and refit else 0.0
        share = min(1.0, _MERGED / max(background, 1.0))
        cells = partial(self._measured, ctx, background, share)
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

    def _measured(self, ctx: StepContext, background: float, share: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield cells with their labels, then draws of the old background; see :meth:`_agreed`.

        Args:
            ctx: context of the step.
            background: number of cells that the old background stands for.
            share: random share of the background, old and new, that is taken.
        """
        # The second generator is in the same state in every process.
        choice, generator = (torch.Generator(ctx.device).manual_seed(seed) for seed in (1 + ctx.rank, 0))
        for batch in self._batches(ctx):
            features, labels = self._cells(ctx, batch)
            dropped = torch.rand(labels.shape, generator=choice, device=ctx.device) >= share
            labels = torch.where((labels == BACKGROUND) & dropped, IGNORE, labels)
            yield features, self._agreed(ctx, features, labels)
        parts = math.ceil(background * share / _AT_ONCE)
        for _ in range(parts):
            amounts = torch.zeros_like(self.amounts)
            amounts[0] = background * share / parts
            drawn, ids = self._draw(amounts, generator)
            yield drawn, self._agreed(ctx, drawn, ids)

    def _agreed(self, ctx: StepContext, features: Tensor, labels: Tensor) -> Tensor:
        """Return the labels [n], with background ignored where the classifier predicts a class."""
        taken = _classify(ctx.model.classify, features).argmax(1) != BACKGROUND
        return torch.where((labels == BACKGROUND) & taken, IGNORE, labels)

    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the rule that predicts the channel with the largest logit."""
        return partial(torch.argmax, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the bank."""
        return self.bank.state_dict() if self.bank else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bank."""
        self.bank = GaussianBank.from_state_dict(state) if state else None

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


def _classify(classify: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
    """Return the logits [n, C] of features [n, D]."""
    return classify(features.T[None, :, :, None])[0, :, :, 0].T.float()
