"""Constellation on a network that stays as it is: a step adds classes, whose logits compete with the earlier ones.

docs/adopt.md describes the method. It continues from any network with a softmax over background and classes, such as
one that another library trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2.functional import resize as resize_image

from starseg.data.images import read_image
from starseg.data.samples import Batch
from starseg.losses.distillation import unbiased_cross_entropy_map
from starseg.losses.reduction import mean
from starseg.losses.star import upsample
from starseg.methods.gaussian_replay import NETWORK, ClassifierOptions, GaussianReplay, classify_cells
from starseg.methods.protocol import Group, Method, Network, Stage, StepContext, register_method
from starseg.methods.recipes import Recipes
from starseg.methods.softmax import SoftmaxMethod
from starseg.models import Segmenter
from starseg.models.classifiers import SOFTMAX, HeadLayout
from starseg.models.decoders import Descriptor
from starseg.models.extended import AddedHead, ExtendedSegmenter, extend
from starseg.replay.gaussians import Cells, GaussianBank, fit_mixtures
from starseg.replay.statistics import count_ids
from starseg.tasks import BACKGROUND, IGNORE
from starseg.utils.files import read_text, split_lines

if TYPE_CHECKING:
    from starseg.engine.checkpoint import StepInfo

COPY = "copy"
"""Name of the stage that tunes a copy of the network."""
# Cells that are used of a crop: neighbours of a fine grid are nearly the same.
_CELLS = 512
# Share of the new classes' number of cells from which an earlier class counts as known.
_KNOWN = 0.15
# Unlabelled photos that are looked at.
_PHOTOS = 512


class ExtendOptions(ClassifierOptions):
    """Options of constellation-extend."""

    pseudo: float = Field(0.5, ge=0, le=1)
    """Probability from which a prediction of the previous network makes a cell part of a mixture."""
    within: int = Field(BACKGROUND, ge=-1)
    """Training id of what the new classes belonged to before: 0 the background, -1 any class."""
    refine: bool = False
    """Whether a factor and an offset for each logit of the network itself are trained as well."""
    averaging: float = Field(0.7, ge=0, le=1)
    """Weight of the whole image in the decision about a cell if nothing is known of the earlier classes."""
    margin: float = Field(2.5, ge=0)
    """Subtracted from the log-odds of new classes if nothing is known of the earlier ones; less, if of some."""
    penalty: float = Field(10.0, ge=0)
    """Subtracted likewise, times how much the mean squared z-score of a cell's features in the new class exceeds 1."""
    photos: Path | None = None
    """List of unlabelled images, whose confident predictions of the network's own classes are replayed."""
    tune_copy: bool = False
    """Whether the first step tunes a copy of the network, whose feature map is then part of the description."""


@register_method("constellation-extend")
class ConstellationExtend(GaussianReplay):
    """Added classes on a descriptor of a frozen network, whose own logits stay as they are.

    Attributes:
        shown: [n, D + C0] float16 features of cells of earlier classes in the unlabelled photos, ordered by class; None
            without photos.
        shown_counts: [1 + K] int64 number of these of each class.
        photos: the unlabelled photos that are looked at.
    """

    summary = "frozen network with its own logits; each step adds classes that compete with them"
    source = "starseg"
    stores = "the network; a mixture of Gaussians per class"
    layout = SOFTMAX
    recipes: ClassVar[Recipes] = SoftmaxMethod.recipes
    later_options = frozenset(ExtendOptions.model_fields)
    Options = ExtendOptions
    options: ExtendOptions

    def __init__(self, options: ExtendOptions) -> None:
        super().__init__(options)
        self.shown: Tensor | None = None
        self.shown_counts: Tensor
        self.photos: Sequence[Path] = ()

    def grow(self, model: Segmenter, classes: int) -> Segmenter:
        """Return the network with a head for new classes on its descriptor."""
        options = self.options
        return extend(model, classes, options.within, options.width, options.window, options.tune_copy)

    def own_stage(self, step: int, pretrained: bool) -> Stage | None:
        """Return the training of the new head; None for step 0."""
        return replace(self.classifier_stage(), cells=_CELLS) if step else None

    def stages(self, ctx: StepContext) -> tuple[Stage, ...]:
        """Return the training of the network in step 0, and afterwards of a copy, if it is tuned, and the new head."""
        own = self.own_stage(ctx.step, ctx.pretrained)
        if own is None:
            return (Stage(NETWORK),)
        tunes = self.options.tune_copy and not isinstance(ctx.old_model, ExtendedSegmenter)
        return (Stage(COPY), own) if tunes else (own,)

    def can_continue(self, info: StepInfo, state: Mapping[str, Tensor]) -> str | None:
        """Return why the network of a finished step cannot be extended: it has no softmax with 1x1 heads."""
        if info.layout not in (SOFTMAX, HeadLayout(SOFTMAX.lead, extended=True)):
            return f"a step of {info.method} has other classifier heads than a softmax with a background"
        return None

    def freeze(self, ctx: StepContext) -> None:
        """Freeze everything but the new head, except in step 0; the calibration is trained if that is allowed.

        The stage that tunes a copy trains the copy alone.
        """
        if ctx.stage.name == NETWORK:
            return
        model = _extended(ctx.model)
        model.tuning = ctx.stage.name == COPY
        model.freeze_all_but([_copy_of(model) if model.tuning else model.heads[-1]])
        if self.options.refine and not model.tuning:
            model.calibration.requires_grad_(True)

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return the parameters of the new head and of the calibration; in step 0, those of the network."""
        if ctx.stage.name == NETWORK:
            return [Group("network", ctx.model)]
        model = _extended(ctx.model)
        if ctx.stage.name == COPY:
            return [Group("copy", _copy_of(model))]
        return [Group("new head", model.heads[-1]), Group("calibration", model.calibration, decay=False)]

    def begin_step(self, ctx: StepContext) -> None:
        """Fit the descriptor if the network has just got one, measure the photos, and plan the replay."""
        Method.begin_step(self, ctx)
        if ctx.stage.name == NETWORK:
            return
        if self.options.photos:
            self.photos = _listed(self.options.photos)
        if ctx.stage.name == COPY:
            return
        if not isinstance(ctx.old_model, ExtendedSegmenter):
            self._fit_descriptor(ctx)
        if self.photos:
            self._measure_photos(ctx)
        self._plan(ctx)

    def _descriptor(self, model: Segmenter) -> Descriptor:
        return _extended(model).descriptor

    def _maps(self, model: Segmenter, images: Tensor) -> tuple[Sequence[Tensor], Sequence[int]]:
        return _extended(model).describe(images)

    def _previous(self, ctx: StepContext, features: Tensor) -> Tensor:
        """Return the previous network's logits [n, C] of features [n, D + C0]."""
        if isinstance(ctx.old_model, ExtendedSegmenter):
            return super()._previous(ctx, features)
        return features[:, self._descriptor(ctx.model).width :]

    @torch.no_grad()
    def _labels(self, ctx: StepContext, features: Tensor, labels: Tensor) -> Tensor:
        """Return the labels [n], with the previous network's predictions for all background cells."""
        return torch.where(labels == BACKGROUND, self._previous(ctx, features).argmax(1), labels)

    def _confident(self, ctx: StepContext, features: Tensor, labels: Tensor) -> Tensor:
        """Return the labels [n], with the previous network's predictions for background cells where it is confident.

        Cells that the classifier in training takes for a new class are ignored.
        """
        chance, winner = self._previous(ctx, features).softmax(1).max(1)
        new = classify_cells(ctx, ctx.model, features).argmax(1) >= ctx.first_new
        seen = torch.where((chance > self.options.pseudo) & ~new, winner, IGNORE)
        return torch.where(labels == BACKGROUND, seen, labels)

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the losses of the new head; or those of the copy, as MiB's, in which old classes count together.

        The copy also sees as many unlabelled photos as images, of which those pixels count in which the network is
        confident of one of its own classes.
        """
        if self.ctx.stage.name != COPY:
            return super().losses(batch, new, old)
        photos = self._draw_photos(len(batch.images))
        logits = upsample(new(torch.cat([batch.images, *photos])).logits, batch.labels)
        labels = [batch.labels.long(), *(self._own_classes(logits[len(batch.images) :].detach()) for _ in photos)]
        loss = unbiased_cross_entropy_map(logits, torch.cat(labels), self.ctx.first_new)
        return {"ce": mean(loss, self.ctx.all_reduce_sum)}

    def _draw_photos(self, number: int) -> list[Tensor]:
        """Return one batch of ``number`` of the unlabelled photos, at random; none if there are none."""
        if not self.photos:
            return []
        ctx = self.ctx
        drawn = torch.randint(len(self.photos), (number * ctx.world,), generator=ctx.generator, device=ctx.device)
        return [torch.cat([self._photo(ctx, self.photos[row]) for row in drawn[ctx.rank :: ctx.world].tolist()])]

    def _photo(self, ctx: StepContext, path: Path) -> Tensor:
        """Return an unlabelled photo as a normalised image [1, 3, crop, crop]."""
        return ctx.model.normalize(resize_image(read_image(path), [ctx.crop, ctx.crop], antialias=True)[None])

    def _own_classes(self, logits: Tensor) -> Tensor:
        """Return the network's own classes [N, *] in photos, ignored where its logits [N, C, *] leave a doubt."""
        chance, winner = logits[:, : self.ctx.first_new].float().softmax(1).max(1)
        own = (chance > self.options.pseudo) & (winner != BACKGROUND)
        return torch.where(own, winner, IGNORE)

    def _measure_photos(self, ctx: StepContext) -> None:
        """Add to the bank the classes that the previous network finds in the unlabelled photos."""
        draw, found = torch.Generator().manual_seed(ctx.rank), []
        for path in self.photos[ctx.rank :: ctx.world] or self.photos[:1]:
            features = ctx.model(self._photo(ctx, path)).features.float().movedim(1, -1).flatten(0, -2)
            features = features[torch.randperm(len(features), generator=draw)[:_CELLS].to(ctx.device)]
            found.append((features, self._own_classes(self._previous(ctx, features))))
        self._fit(ctx, lambda: found, range(1, ctx.first_new), ctx.first_new, 1)
        features, labels = map(torch.cat, zip(*found, strict=True))
        order = labels.argsort()[: int((labels != IGNORE).sum())]
        self.shown, self.shown_counts = features[order].half(), count_ids(labels, ctx.first_new)

    def _missing(self, ctx: StepContext) -> Tensor:
        """Return the stored counts [1 + K], for a class that is stored at all at least the number of the new cells.

        A new image shows the new class for certain, but how often the network will see it is not known. What it finds
        of an earlier class in the new images is not subtracted, because it errs around the new objects.
        """
        assert self.bank is not None, "nothing is replayed without a bank"
        stored = self.bank.counts.double() * self.options.replay
        missing = stored.maximum(self.found[ctx.first_new :].sum()).where(stored > 0, stored)
        missing[BACKGROUND] = stored[BACKGROUND]
        return missing

    def _draw_all(self, amounts: Tensor, generator: torch.Generator, size: int | None) -> tuple[Tensor, Tensor]:
        """Draw features: of classes that the unlabelled photos show, cells of these; of others, from the bank."""
        features, ids = super()._draw_all(amounts, generator, size)
        if self.shown is None or not len(self.shown):
            return features, ids
        known = ids.where(ids != IGNORE, BACKGROUND)
        number, first = self.shown_counts[known], (self.shown_counts.cumsum(0) - self.shown_counts)[known]
        chance = torch.rand(len(ids), generator=generator, device=ids.device)
        cells = self.shown[(first + (chance * number).long()).clamp_max(len(self.shown) - 1)].float()
        return torch.where((number > 0)[:, None], cells, features), ids

    def end_step(self, ctx: StepContext) -> None:
        """Fit the mixtures of the new classes, and of earlier classes that the bank does not hold yet."""
        if ctx.stage.name == NETWORK:
            return

        def cells() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in self._batches(ctx):
                features, labels = self._cells(ctx, batch)
                yield features, self._confident(ctx, features, labels)

        held = set(self.bank.owners.tolist()) if self.bank else set()
        classes = ctx.first_new + ctx.new_classes
        self._fit(ctx, cells, [c for c in range(classes) if c not in held], classes, ctx.stage.crops)
        self._restrain(ctx)

    def _restrain(self, ctx: StepContext) -> None:
        """Lower the log-odds of the new classes by as much as is not known of the earlier ones."""
        assert self.bank is not None, "the mixtures have just been fitted"
        unknown, head, options = self._unknown(ctx), ctx.model.heads[-1], self.options
        assert isinstance(head, AddedHead)
        head.restrain(options.margin * unknown, options.averaging * unknown)
        for row in range(ctx.new_classes):
            if moments := self.bank.moments(ctx.first_new + row):
                mean, variance = (part[: self._descriptor(ctx.model).width] for part in moments)
                head.penalise(row, mean, variance, options.penalty * unknown)

    def _unknown(self, ctx: StepContext) -> float:
        """Return the share of the earlier classes of which nothing is known, 0..1.

        A class is known by its cells in the bank, which now holds what the network found of it in the images, divided
        by :data:`_KNOWN` times the number of the new classes' cells, at most 1.
        """
        assert self.bank is not None, "the mixtures have just been fitted"
        counts = self.bank.counts
        known = counts[1 : ctx.first_new] / (_KNOWN * counts[ctx.first_new :].sum()).clamp_min(1)
        return 1 - float(known.clamp_max(1).mean())

    def _fit(self, ctx: StepContext, cells: Cells, classes: Sequence[int], total: int, crops: int) -> None:
        """Fit mixtures of classes and put them into the bank, where those that have a cell replace earlier ones.

        Args:
            ctx: context of the step.
            cells: features and training ids of this process.
            classes: training ids of the classes to fit.
            total: number of training ids that the bank has afterwards.
            crops: how often each image is among the cells.
        """
        options = self.options
        modes = {c: options.modes if c else options.background_modes for c in classes}
        found, numbers = fit_mixtures(
            cells, modes, options.factors, ctx.generator, ctx.all_reduce_sum, ctx.rank, ctx.world
        )
        counts = numbers.new_zeros(total)
        if self.bank:
            counts[: len(self.bank.counts)] = self.bank.counts.to(numbers)
        counts[torch.tensor(classes)] = torch.where(numbers > 0, numbers / crops, counts[torch.tensor(classes)])
        self.bank = self.bank.to(ctx.device).replace(found, counts) if self.bank else found.replace(found, counts)

    def replay_counts(self) -> None:
        """Return None: how much is replayed depends on the new images alone."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the bank, if the previous step left one of this kind."""
        super().load_state_dict(state if GaussianBank.fits(state) else {})


def _listed(path: Path) -> list[Path]:
    """Return the photos listed in a file, evenly chosen so that there are at most :data:`_PHOTOS`."""
    photos = [Path(line) for line in split_lines(read_text(path, "surrogateescape")) if line]
    return photos[:: -(-len(photos) // _PHOTOS)]


def _copy_of(model: ExtendedSegmenter) -> Segmenter:
    assert model.tuned is not None, "`grow` made a copy"
    return model.tuned


def _extended(model: Segmenter) -> ExtendedSegmenter:
    assert isinstance(model, ExtendedSegmenter), "every step after step 0 grows its network"
    return model
