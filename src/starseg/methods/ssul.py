"""SSUL and SSUL-M: an unknown class, pseudo-labels and frozen old parameters (Cha et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from starseg.config import Choices, Strict
from starseg.data.samples import EXEMPLAR, SALIENCY, Batch
from starseg.errors import UserError
from starseg.losses.pseudo_labels import fill_in
from starseg.losses.star import bce_per_class, upsample
from starseg.methods.protocol import Group, Method, Network, StepContext, register_method
from starseg.methods.recipes import Recipe, Recipes, StepSchedule
from starseg.models.classifiers import BACKGROUND as BACKGROUND_HEAD
from starseg.models.classifiers import UNKNOWN as UNKNOWN_HEAD
from starseg.models.classifiers import HeadLayout, copy_head
from starseg.ops.labels import ignored_id, signed_ids
from starseg.replay.memory import MemoryRule
from starseg.tasks import BACKGROUND

# Channel 0 is the unknown class, channel 1 the background, channel c + 1 class c.
_UNKNOWN, _BACKGROUND = 0, 1


class SsulOptions(Strict):
    """Options of SSUL and SSUL-M."""

    saliency_dir: Path | None = None
    """Folder with one greyscale PNG per training image, named like the image: background pixels with a value above 0
    are labelled unknown. Without a folder all background is, as on ADE20K."""
    threshold: float = Field(0.7, ge=0, le=1)
    """Smallest sigmoid at which a prediction of the previous model becomes a pseudo-label."""


@register_method("ssul")
class Ssul(Method):
    """Unknown class from saliency maps and pseudo-labels; later steps train only the leading heads and the new one."""

    summary = "an unknown class from saliency maps, pseudo-labels, all but the new head frozen"
    source = "Cha et al., NeurIPS 2021"
    layout = HeadLayout((UNKNOWN_HEAD, BACKGROUND_HEAD), conv=True)
    freezes = True
    later_options = frozenset({"threshold"})
    Options = SsulOptions
    options: SsulOptions

    recipes: ClassVar[Recipes] = {
        "voc": Recipe(StepSchedule(50, 1e-2), StepSchedule(50, 1e-2), expected=("saliency_dir",)),
        "ade": Recipe(StepSchedule(100, 1e-2), StepSchedule(100, 5e-2), warmup=0.1),
    }

    def extra_maps(self) -> dict[str, Path]:
        """Return the folder of saliency maps, if one is given.

        Raises:
            UserError: it is not a folder.
        """
        folder = self.options.saliency_dir
        if folder is None:
            return {}
        if not folder.is_dir():
            raise UserError(f"ssul.saliency_dir: {folder} is no folder")
        return {SALIENCY: folder}

    def notes(self, recipe: Recipe | None) -> list[str]:
        """Report missing saliency maps, unless the recipe does not expect them."""
        if self.options.saliency_dir or (recipe and "saliency_dir" not in recipe.expected):
            return []
        return [f"{self.name} without saliency maps (ssul.saliency_dir): all background counts as unknown"]

    def init_heads(self, ctx: StepContext) -> None:
        """After step 0, start every new class as a copy of the unknown class."""
        if ctx.step:
            copy_head(ctx.model.lead[UNKNOWN_HEAD], ctx.model.heads[-1])

    def freeze(self, ctx: StepContext) -> None:
        """After step 0, freeze everything but the leading heads and the new one."""
        if ctx.step:
            ctx.model.freeze_all_but([*ctx.model.lead.values(), ctx.model.heads[-1]])

    def param_groups(self, ctx: StepContext) -> list[Group]:
        """Return groups in which the encoder learns a tenth as fast as the decoder and the heads.

        After step 0, the learning rate of the background head is multiplied by 1e-4.
        """
        model = ctx.model
        return [
            Group("encoder", model.encoder, 0.1),
            Group("decoder", model.decoder),
            Group("unknown head", model.lead[UNKNOWN_HEAD]),
            Group("background head", model.lead[BACKGROUND_HEAD], 1e-4 if ctx.step else 1.0),
            Group("class heads", model.heads),
        ]

    def targets(self, batch: Batch, old_logits: Tensor | None) -> Tensor:
        """Return the target channel of each pixel, [N, H, W] int64 or int32, 255 or 65535 where it is ignored.

        Args:
            batch: labels, saliency maps if there are any, and exemplar flags.
            old_logits: [N, C°, H, W] of the previous model, whose confident predictions replace background and unknown;
                None at step 0.
        """
        labels, ignored = signed_ids(batch.labels), ignored_id(batch.labels)
        unknown = labels == BACKGROUND
        if SALIENCY in batch.extras:
            unknown &= batch.extras[SALIENCY] > 0
        shifted = torch.where(labels == ignored, ignored, labels + 1)
        if EXEMPLAR in batch.extras:
            exemplar = batch.extras[EXEMPLAR][:, None, None]
            unknown &= ~exemplar
            if self.ctx.choices.unshifted_exemplar_labels:
                shifted = torch.where(exemplar, labels, shifted)
        channels = torch.where(unknown, _UNKNOWN, shifted)
        if old_logits is None:
            return channels
        return fill_in(channels, old_logits, self.options.threshold, lead=1, background=_BACKGROUND)

    def losses(self, batch: Batch, new: Network, old: Network | None) -> dict[str, Tensor]:
        """Return the BCE of all channels, summed over them, with the previous model's pseudo-labels."""
        old_logits = upsample(old(batch.images).logits, batch.labels) if old else None
        logits = new(batch.images).logits.float()
        targets = self.targets(batch, old_logits)
        return {"bce": bce_per_class(logits, targets, first_id=0, all_reduce_sum=self.ctx.all_reduce_sum).sum()}

    def rule(self, choices: Choices) -> Callable[[Tensor], Tensor]:
        """Return the rule :func:`merge_unknown`."""
        return merge_unknown

    def confident(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the labels with confident predictions filled in; the leading channels compete with the classes."""
        assert self.memory is not None
        return fill_in(labels, logits, self.memory.score, lead=len(self.layout.lead))


def merge_unknown(logits: Tensor) -> Tensor:
    """Training ids [N, ...] from [N, C, ...]: argmax of the sigmoids, the unknown class's added to the background's."""
    scores = logits.float().sigmoid()
    background = scores[:, _BACKGROUND] + scores[:, _UNKNOWN]
    return torch.cat([background[:, None], scores[:, _BACKGROUND + 1 :]], 1).argmax(1)


@register_method("ssul-m")
class SsulM(Ssul):
    """SSUL with an exemplar memory that fills half of every batch."""

    summary = "SSUL with an exemplar memory that fills half of every batch"
    stores = "the previous model, 100 images (ADE20K: 300)"
    section = base_step = "ssul"
    memory = MemoryRule(score=0.7, mix="half", labels="seen")
    recipes: ClassVar[Recipes] = {
        "voc": replace(Ssul.recipes["voc"], memory_size=100),
        "ade": replace(Ssul.recipes["ade"], memory_size=300),
    }
