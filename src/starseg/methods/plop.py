"""PLOP: pooled distillation of several maps and pseudo-labels filtered by entropy (Douillard et al., CVPR 2021)."""

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
    """Weight of each feature map's pooled distance; by default the recipe's value (0.01 on VOC, 0.001 on ADE20K)."""
    pod_logits: float | None = from_recipe(ge=0)
    """Weight of the logits' pooled distance; by default the recipe's value (5e-4 on VOC, 1e-5 on ADE20K)."""
    threshold: Literal["median", "binned"] = "median"
    """Entropy below which a prediction becomes a pseudo-label. "median": the median of its class. "binned": as
    published, the median from 100 bins of an entropy divided by further factors, at least 0.001 (with `compat:
    published`, also with the faulty running count)."""


_SOFTMAX = SoftmaxMethod.recipes


@register_method("plop")
class Plop(BackgroundInit):
    """Local POD on six maps, and pseudo-labels where the previous model's entropy is below its class's threshold."""

    summary = "Local POD on six maps, pseudo-labels where the previous model's entropy is below the class's median"
    base_step = "lwf"
    source = "Douillard et al., CVPR 2021"
    domains = True
    Options = PlopOptions
    options: PlopOptions
    maps = True
    thresholds: Tensor

    recipes: ClassVar[Recipes] = {
        "voc": replace(
            _SOFTMAX["voc"], options={"pod": 1e-2, "pod_logits": 5e-4}, tasks={"10-1": StepSchedule(10, 1e-3)}
        ),
        "ade": replace(_SOFTMAX["ade"], options={"pod": 1e-3, "pod_logits": 1e-5}),
        "city_domain": replace(_SOFTMAX["city_domain"], options={"pod": 1e-2, "pod_logits": 5e-4}),
    }

    def begin_step(self, ctx: StepContext) -> None:
        """Measure each class's entropy threshold, in one pass of the previous model over pixels labelled background."""
        super().begin_step(ctx)
        if ctx.old_model is None or ctx.task.domains:
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
        """Return the uncertainty of the previous model's predictions: [N, C°, H, W] -> [N, H, W]."""
        ctx = self.ctx
        if self._binned(ctx):
            return published_entropy(old_logits, ctx.first_new + ctx.new_classes)
        return entropy(old_logits)

    def terms(self, batch: Batch, output: Output, previous: Output | None) -> dict[str, Tensor]:
        """Return the cross-entropy on pseudo-labels and the pooled distillation; at step 0, the plain cross-entropy.

        With domains all classes are labelled, and there are no pseudo-labels.
        """
        if previous is None:
            return super().terms(batch, output, previous)
        if self.ctx.task.domains:
            return {**super().terms(batch, output, previous), "pod": self.pod(output, previous)}
        ctx = self.ctx
        logits, old_logits = (upsample(o.logits, batch.labels) for o in (output, previous))
        labels, share = fill_in_certain(
            batch.labels, old_logits, self.uncertainty(old_logits), self.thresholds, ctx.first_new
        )
        loss = share[:, None, None] * cross_entropy_map(logits, labels)
        return {"ce": mean(loss, ctx.all_reduce_sum), "pod": self.pod(output, previous)}

    def pod(self, output: Output, previous: Output) -> Tensor:
        """Return the pooled distillation of the encoder's last four maps, the features and the logits."""
        ctx, options = self.ctx, self.options
        assert options.pod is not None and options.pod_logits is not None, "filled in by apply_recipe"
        new, old = ([m.float() for m in (*(o.maps or ())[-4:], o.features, o.logits)] for o in (output, previous))
        weights = [options.pod] * (len(new) - 1) + [options.pod_logits]
        return pooled_distillation(new, old, weights, ctx.growth, all_reduce_sum=ctx.all_reduce_sum)
