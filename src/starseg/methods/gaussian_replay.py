"""Base of methods that train a classifier on features of a frozen network and on draws from mixtures of Gaussians."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from starseg.config import Choices, Strict
from starseg.data.samples import FEATURES, ROWS, Batch
from starseg.methods.protocol import Method, Network, Stage, StepContext
from starseg.methods.recipes import StepSchedule
from starseg.models import Segmenter
from starseg.models.decoders import Descriptor
from starseg.replay.gaussians import GaussianBank
from starseg.replay.statistics import count_ids, sample_at_stride
from starseg.tasks import BACKGROUND, IGNORE

if TYPE_CHECKING:
    pass

# Cells from which the descriptor's statistics are computed.
_STATISTICS = 50_000
NETWORK, CLASSIFIER = "network", "classifier"
"""Names of the stages that train the network, and the classifier on its features."""


class ClassifierOptions(Strict):
    """Options of a classifier that is trained on cached and on replayed features."""

    epochs: int = Field(6, gt=0)
    """Epochs of the classifier over the computed features."""
    lr: float = Field(0.1, gt=0)
    """Learning rate of the classifier."""
    crops: int = Field(4, gt=0)
    """Augmented crops of each image whose features are computed."""
    window: int = Field(5, ge=0)
    """Side of the window, in cells, over which the deepest map is averaged, an odd number; 0 for no such average."""
    width: int = Field(256, gt=0)
    """Feature channels after the projection."""
    floor: float = Field(0.015, ge=0)
    """Share of the total variance up to which components keep their relative variances; those above get the same."""
    modes: int = Field(8, gt=0)
    """Gaussians of a class."""
    background_modes: int = Field(16, gt=0)
    """Gaussians of the background."""
    factors: int = Field(4, ge=0)
    """Factors of the covariance of a Gaussian, beside its diagonal."""
    pseudo: float = Field(0.8, ge=0, le=1)
    """Probability above which the previous classifier's prediction of an earlier class labels a background pixel."""
    balance: float = Field(0.2, ge=0, le=1)
    """Exponent of the inverse frequency by which classes are weighted: 0 for none, 1 for equal weights."""
    draws: int = Field(2048, ge=0)
    """Features replayed in an iteration, over all processes; 0 for no replay."""
    replay: float = Field(1.0, gt=0, le=1)
    """Share of the stored counts that a later step replays. The counts carried on to the next step are not scaled."""
    reject: bool = True
    """Whether draws are left out that the previous classifier takes for another class, unless targets are soft."""
    shift: float = Field(0.2, ge=0, le=1)
    """Probability of the new classes above which replayed background is left out; 1 for none."""

    @field_validator("window")
    @classmethod
    def _is_odd(cls, value: int) -> int:
        if value and not value % 2:
            raise ValueError("expected an odd number, or 0")
        return value


class GaussianReplay(Method):
    """Training of a classifier on the features of a step's images, and on draws from the mixtures of earlier classes.

    Attributes:
        bank: the mixtures; None before the first are fitted.
        found: [C] float64 cells of each training id in the step's images, as :meth:`_labels` returns them.
        totals: [C] float64 these and the cells that are replayed.
        known: [n, c] uint8 labels of the cells that the engine holds in memory, completed by the previous classifier;
            None if it holds none.
    """

    wide = False
    options: ClassifierOptions

    def __init__(self, options: ClassifierOptions) -> None:
        super().__init__(options)
        self.bank: GaussianBank | None = None
        self.found: Tensor
        self.totals: Tensor
        self.known: Tensor | None = None
        self.amounts: Tensor
        self.draw_weights: Tensor
        self.draw_size: int | None = None
        self.class_weights: Tensor

    def classifier_stage(self) -> Stage:
        """Return the stage that trains the classifier."""
        return Stage(CLASSIFIER, StepSchedule(self.options.epochs, self.options.lr), self.options.crops)

    def _fit_descriptor(self, ctx: StepContext) -> None:
        """Fit the descriptor to the mean and covariance of raw descriptions, over all processes."""
        descriptor = self._descriptor(ctx.model)
        shift: Tensor | None = None
        sums: list[Tensor] = []
        cells = 0
        for batch in ctx.scan("before"):
            raw = descriptor.raw(*self._maps(ctx.model, batch.images)).movedim(1, -1).flatten(0, 2).float()
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
        descriptor.fit(shift.double() + mean, covariance, self.options.floor)

    def _descriptor(self, model: Segmenter) -> Descriptor:
        """Return the descriptor of a network."""
        assert isinstance(model.decoder, Descriptor)
        return model.decoder

    def _maps(self, model: Segmenter, images: Tensor) -> tuple[Sequence[Tensor], Sequence[int]]:
        """Return the maps of images that the descriptor reads, and its grid."""
        output = model(images, maps=True)
        assert output.maps is not None
        return output.maps, output.features.shape[2:]

    def _plan(self, ctx: StepContext) -> None:
        """Count the cells of each class in the images, and compute what is missing of the old classes."""
        classes = ctx.first_new + ctx.new_classes
        found = torch.zeros(classes, dtype=torch.float64, device=ctx.device)
        parts = []
        for batch in self._batches(ctx):
            labels = self._labels(ctx, *self._cells(ctx, batch))
            found += count_ids(labels, classes)
            parts.append(labels.to(torch.uint8).view(len(batch), -1))
        self.known = torch.cat(parts) if ctx.cached else None
        self.found = ctx.all_reduce_sum(found) / ctx.stage.crops
        per_pass = ctx.iterations / ctx.stage.crops
        totals = self.found.clone()
        if self.bank:
            self.bank = self.bank.to(ctx.device)
            missing = self._missing(ctx)
            owed = (missing / per_pass).float()
            self.amounts = self.options.draws * owed.sqrt() / owed.sqrt().sum().clamp_min(1e-12)
            self.draw_weights = owed / self.amounts.clamp_min(1e-12)
            if ctx.device.type == "cuda":  # a fixed size, as a random one would make every iteration wait for the GPU
                self.draw_size = self.options.draws + len(self.bank.owners)
            totals[: ctx.first_new] += missing
        self.totals = totals
        share = totals.clamp_min(1) / totals.sum()
        self.class_weights = share.pow(-self.options.balance).float()

    def _missing(self, ctx: StepContext) -> Tensor:
        """Return how many cells [1 + K] of each earlier class are to be replayed in a pass over the images."""
        assert self.bank is not None, "nothing is replayed without a bank"
        missing = self.bank.counts.double() * self.options.replay
        if ctx.task.setting == "overlap":
            missing[1:] -= self.found[1 : ctx.first_new]
        return missing.clamp_min(0)

    def _batches(self, ctx: StepContext) -> Iterator[Batch]:
        return ctx.cached() if ctx.cached else ctx.scan("crop 0")

    def _cells(self, ctx: StepContext, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the features [n, D] of a batch and their labels [n]."""
        if (features := batch.extras.get(FEATURES)) is not None:
            labels = batch.labels
        else:
            with torch.no_grad():
                features = ctx.model(batch.images).features
            labels = sample_at_stride(batch.labels, ctx.model.feature_stride)
        return features.float().movedim(1, -1).flatten(0, -2), labels.flatten().long()

    @torch.no_grad()
    def _labels(self, ctx: StepContext, features: Tensor, labels: Tensor) -> Tensor:
        """Return the labels [n], with earlier classes where the previous classifier is confident of them.

        The other background cells keep their label: a classifier that never saw the surroundings of the new classes
        takes some of them for its own classes.
        """
        if ctx.old_model is None:
            return labels
        chance, winner = self._previous(ctx, features).softmax(1).max(1)
        return torch.where((labels == BACKGROUND) & (chance > self.options.pseudo), winner, labels)

    def _previous(self, ctx: StepContext, features: Tensor) -> Tensor:
        """Return the previous classifier's logits [n, C] of features [n, D]."""
        assert ctx.old_model is not None, "step 0 has no previous classifier"
        return classify_cells(ctx, ctx.old_model, features)

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the cross-entropy of the batch's cells, and in a later step of replayed features."""
        ctx = self.ctx
        if ctx.stage.name == NETWORK:
            output = new(batch.images)
            labels = sample_at_stride(batch.labels, ctx.model.stride).flatten().long()
            logits = output.logits.float().movedim(1, -1).flatten(0, -2)
            return {"ce": self._mean(*_cross_entropy(logits, labels), torch.ones_like(logits[:, 0]))}
        drawn, ids = self._draw(self.amounts, ctx.generator, self.draw_size) if self.bank else (None, batch.labels)
        features, labels = self._cells(ctx, batch)
        output = new(batch.images, drawn, features=features.T[None, :, :, None])
        if self.known is not None and ROWS in batch.extras:
            labels = self.known[batch.extras[ROWS]].flatten().long()
        else:
            labels = self._labels(ctx, features, labels)
        terms, counted = _cross_entropy(output.logits.float()[0, :, :, 0].T, labels)
        weights = self.class_weights[labels.where(labels != IGNORE, 0)]
        if output.extra_logits is not None and drawn is not None:
            replayed = self._replayed(ctx, drawn, ids, output.extra_logits.float())
            drawn_weights = (self.draw_weights * self.class_weights[: ctx.first_new])[ids.where(ids != IGNORE, 0)]
            parts = zip((terms, counted, weights), (*replayed, drawn_weights), strict=True)
            terms, counted, weights = (torch.cat(part) for part in parts)
        return {"ce": self._mean(terms, counted, weights)}

    def _replayed(self, ctx: StepContext, drawn: Tensor, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy [n] of drawn features with the classes of their mixtures, and which count [n].

        Args:
            ctx: context of the step.
            drawn: [n, D].
            ids: [n] class from whose mixture each was drawn, 255 in rows without a feature.
            logits: [n, C] of the classifier that is being trained.
        """
        left_out = self._looks_new(ctx, ids, logits)
        if self.options.reject:
            left_out |= self._previous(ctx, drawn).argmax(1) != ids
        return _cross_entropy(logits, torch.where(left_out, IGNORE, ids))

    @torch.no_grad()
    def _looks_new(self, ctx: StepContext, ids: Tensor, logits: Tensor) -> Tensor:
        """Return which draws [n] of the background the classifier in training may take for new classes."""
        return (logits.softmax(1)[:, ctx.first_new :].sum(1) > self.options.shift) & (ids == BACKGROUND)

    def _draw(self, amounts: Tensor, generator: torch.Generator, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw features and return this process's share."""
        features, ids = self._draw_all(amounts, generator, size)
        return features[self.ctx.rank :: self.ctx.world], ids[self.ctx.rank :: self.ctx.world]

    def _draw_all(self, amounts: Tensor, generator: torch.Generator, size: int | None) -> tuple[Tensor, Tensor]:
        """Draw features from the bank; see :meth:`GaussianBank.draw`."""
        assert self.bank is not None, "begin_step refuses a later step without a bank"
        return self.bank.draw(amounts, generator, size)

    def _mean(self, terms: Tensor, counted: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean of the terms [n] that count, over all processes."""
        total = self.ctx.all_reduce_sum(weights @ counted.float())
        return self.ctx.all_reduce_sum(terms @ weights) / total.clamp_min(1e-12)

    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the rule that predicts the channel with the largest logit."""
        return partial(torch.argmax, dim=1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the bank."""
        return self.bank.state_dict() if self.bank else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bank."""
        self.bank = GaussianBank.from_state_dict(state) if state else None


def classify_cells(ctx: StepContext, model: Segmenter, features: Tensor) -> Tensor:
    """Return the logits [n, C] of features [n, D], computed in the precision of training."""
    with ctx.autocast():
        return model.classify_cells(features).float()


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy [n] of logits [n, C], 0 where the label is ignored, and which labels are not [n]."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none"), labels != IGNORE
