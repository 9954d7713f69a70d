"""PLOP: pooled distillation of many maps and pseudo-labels filtered by entropy (Douillard et al., CVPR 2021)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor

from starseg.config import Strict
from starseg.data.samples import Batch
from starseg.losses.distillation import cross_entropy_map, pooled_distillation
from starseg.losses.pseudo_labels import EntropyHistogram, entropy, fill_in_certain, published_entropy
from starseg.losses.reduction import mean
from starseg.losses.star import upsample
from starseg.methods.mib import BackgroundInit
from starseg.methods.protocol import StepContext, register_method
from starseg.methods.recipes import Recipes, StepSchedule, from_recipe
from starseg.methods.softmax import SoftmaxMethod
from starseg.models import Output
from starseg.tasks import BACKGROUND

_FINE, _PUBLISHED = 2**17, 100
_FLOOR = 0.001


class PlopOptions(Strict):
    """Options of PLOP."""

    pod: float | None = from_recipe(ge=0)
    """Weight of each feature map's pooled distance; by default the recipe's (0.01 on VOC, 0.001 on ADE20K)."""
    pod_logits: float | None = from_recipe(ge=0)
    """The same of the logits; by default the recipe's (5e-4 on VOC, 1e-5 on ADE20K)."""
    threshold: Literal["median", "binned"] = "median"
    """A prediction counts below its class's median entropy; "binned": the published 100 bins of an entropy divided by
    further factors, at least 0.001 (`compat: published`: with the faulty running count)."""


_SOFTMAX = SoftmaxMethod.recipes


@register_method("plop")
class Plop(BackgroundInit):
    """PLOP (Douillard et al., CVPR 2021)."""

    summary = "Local POD on six maps, pseudo-labels where the previous model's entropy is below the class's median"
    base_step = "lwf"
    source = "Douillard et al., CVPR 2021"
    Options = PlopOptions
    options: PlopOptions
    maps = True
    thresholds: Tensor

    recipes: ClassVar[Recipes] = {
        "voc": replace(
            _SOFTMAX["voc"], options={"pod": 1e-2, "pod_logits": 5e-4}, tasks={"10-1": StepSchedule(10, 1e-3)}
        ),
        "ade": replace(_SOFTMAX["ade"], options={"pod": 1e-3, "pod_logits": 1e-5}),
    }

    def begin_step(self, ctx: StepContext) -> None:
        """Measure how uncertain the previous model is of each class where the labels say background."""
        super().begin_step(ctx)
        if ctx.old_model is None:
            return
        binned = self._binned(ctx)
        histogram = EntropyHistogram.zeros(ctx.first_new, _PUBLISHED if binned else _FINE, ctx.device)
        for batch in ctx.scan("before"):
            logits = upsample(ctx.old_model(batch.images).logits, batch.labels)
            histogram.update(self.uncertainty(logits), logits.argmax(1), batch.labels == BACKGROUND)
        histogram = EntropyHistogram(ctx.all_reduce_sum(histogram.counts))
        running_index = ctx.choices.binned_running_index
        self.thresholds = histogram.binned_medians(_FLOOR, running_index) if binned else histogram.medians()

    def _binned(self, ctx: StepContext) -> bool:
        return ctx.choices.binned_entropy or self.options.threshold == "binned"

    def uncertainty(self, old_logits: Tensor) -> Tensor:
        """Of the previous model's prediction: [N, C°, H, W] -> [N, H, W]."""
        ctx = self.ctx
        if self._binned(ctx):
            return published_entropy(old_logits, ctx.first_new + ctx.new_classes)
        return entropy(old_logits)

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        if previous is None:
            return super().terms(batch, output, previous)
        ctx = self.ctx
        logits, old_logits = (upsample(o.logits, batch.labels) for o in (output, previous))
        labels, share = fill_in_certain(
            batch.labels, old_logits, self.uncertainty(old_logits), self.thresholds, ctx.first_new
        )
        loss = share[:, None, None] * cross_entropy_map(logits, labels)
        return {"ce": mean(loss, ctx.all_reduce_sum), "pod": self.pod(output, previous)}

    def pod(self, output: Output, previous: Output) -> Tensor:
        """Pooled distances of the encoder's last four maps, the features and the logits."""
        ctx, options = self.ctx, self.options
        assert options.pod is not None and options.pod_logits is not None, "filled in by apply_recipe"
        new, old = ([m.float() for m in (*(o.maps or ())[-4:], o.features, o.logits)] for o in (output, previous))
        weights = [options.pod] * (len(new) - 1) + [options.pod_logits]
        growth = (ctx.first_new + ctx.new_classes) / ctx.new_classes
        return pooled_distillation(new, old, weights, growth, all_reduce_sum=ctx.all_reduce_sum)
