"""Dense reference implementation of loss path, step and evaluation that `starseg bench` compares with.

Every logit of every class is upsampled to image size, one-hot targets are made there, and autograd stores what it
needs; vectorised, float32. The formulas are those of docs/reference/star.md without ``compat: published``, for one
process. Shape letters: N images, K classes, H W pixels, h w feature cells, D feature channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD
from torchmetrics.functional.classification import multiclass_confusion_matrix

from starseg.data.samples import Batch
from starseg.losses.star import mix, one_hot
from starseg.methods.protocol import StepContext
from starseg.methods.star import Star, StarOptions
from starseg.models import Output, Segmenter
from starseg.ops import fused_layers
from starseg.ops.bilinear import resize
from starseg.replay.bank import PrototypeBank
from starseg.replay.plan import ReplayPlan
from starseg.tasks import BACKGROUND, IGNORE

_EPS = 1e-3


def dense_bce(logits: Tensor, labels: Tensor, first_id: int, pos_weight: float, published: bool = False) -> Tensor:
    """Compute the base loss [K] of logits [N, K, H, W]; see :func:`starseg.losses.star.bce_per_class`."""
    target = one_hot(labels, first_id, logits.shape[1]).to(logits.dtype)
    weight = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    if published:
        return loss.mean((0, 2, 3))
    valid = (labels != IGNORE)[:, None]
    return (loss * valid).sum((0, 2, 3)) / valid.sum().clamp_min(1)


def dense_old_prediction(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the old model's labels [N, H, W], given its logits [N, K, H, W] at image size."""
    best, winner = logits.max(1)
    return torch.where(best > threshold, winner + 1, BACKGROUND)


def dense_ocfm(features: Tensor, old_features: Tensor, region: Tensor) -> Tensor:
    """Compute old-class feature maintenance over a region [N, H, W]."""
    mask = resize(region[:, None].float(), features.shape[-2:])
    return ((features - old_features).square() * mask).sum() / (features.shape[1] * mask.sum()).clamp_min(1e-12)


def dense_sad(features: Tensor, labels: Tensor, first_id: int, classes: int, old_prototypes: Tensor) -> Tensor:
    """Compute similarity-aware discrimination from labels [N, H, W]."""
    weights = resize(one_hot(labels, first_id, classes).float(), features.shape[-2:])
    sums = torch.einsum("nkhw,ndhw->kd", weights, F.normalize(features, dim=1, eps=_EPS))
    distance = torch.cdist(F.normalize(sums, dim=1, eps=_EPS), old_prototypes).amin(1).clamp_min(1e-6)
    shown = weights.sum((0, 2, 3)) > 0
    return torch.where(shown, 1 / distance, 0).sum() / shown.sum().clamp_min(1)


def dense_base(ctx: StepContext, options: StarOptions, batch: Batch, output: Output) -> Tensor:
    """Compute STAR's loss in step 0."""
    pixels = resize(output.logits, batch.labels.shape[-2:])
    return options.mbce * dense_bce(pixels, batch.labels, ctx.first_new, options.pos_weight or 1.0).sum()


def dense_later(
    ctx: StepContext,
    options: StarOptions,
    batch: Batch,
    output: Output,
    previous: Output,
    bank: PrototypeBank,
    plan: ReplayPlan,
) -> Tensor:
    """Compute STAR's loss in a later step; ``output.extra_logits`` belong to the replayed features."""
    labels, stride, known = batch.labels, ctx.model.stride, ctx.old_classes
    pixels, old_pixels = (resize(o.logits, labels.shape[-2:]) for o in (output, previous))
    seen = dense_old_prediction(old_pixels, options.old_threshold)
    assert output.extra_logits is not None, "the bench replays features"
    replayed = output.extra_logits[:, known:]
    region = (labels == BACKGROUND) & (seen == BACKGROUND)
    cells = region[:, stride // 2 :: stride, stride // 2 :: stride]
    background = output.logits[:, known:].movedim(1, -1)[cells]
    mixed = mix(
        dense_bce(pixels[:, known:], labels, ctx.first_new, options.pos_weight or 1.0),
        F.softplus(replayed).mean(0),
        F.softplus(background).mean(0),
        torch.tensor(len(replayed) / cells.numel()),
        plan.background_ratio * cells.sum() / cells.numel(),
    )
    kept = dense_ocfm(output.features, previous.features, (labels == BACKGROUND) & (seen > 0))
    apart = dense_sad(output.features, labels, ctx.first_new, ctx.new_classes, bank.shown)
    return options.mbce * mixed.sum() + options.ocfm * kept + options.sad * apart


def unfused(network: Segmenter) -> Segmenter:
    """Copy a network with the convolutions and batch norms of torch and timm."""
    network = copy.deepcopy(network)
    theirs = {own: layer for layer, own in fused_layers.OWN_LAYERS.items()}
    for module in network.modules():
        module.__class__ = theirs.get(type(module), type(module))
    return network


class DenseStep:
    """Training step of STAR with torch's own layers and optimizer, in float32 and channels_last: ``step(raw)``.

    Args:
        method: its options and bank.
        ctx: the networks, which are copied.
        plan: of the replay.
    """

    def __init__(self, method: Star, ctx: StepContext, plan: ReplayPlan) -> None:
        assert ctx.old_model is not None and method.bank is not None, "a later step"
        self.ctx, self.options, self.bank, self.plan = ctx, method.options, method.bank, plan
        self.old, self.new = unfused(ctx.old_model), unfused(ctx.model).train()
        trained = [p for p in self.new.parameters() if p.requires_grad]
        self.optimizer = SGD(trained, lr=1e-6, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def __call__(self, raw: Batch) -> Tensor:
        """Train on a batch and return its loss."""
        images = self.new.normalize(raw.images)
        batch = replace(raw, images=images, labels=raw.labels.to(images.device))
        replayed = self.bank.draw(self.plan.rows, self.ctx.generator, self.options.norm_noise)
        with torch.no_grad():
            previous = self.old(images)
        output = self.new(images, replayed)
        loss = dense_later(self.ctx, self.options, batch, output, previous, self.bank, self.plan)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def dense_confusion(model: Segmenter, rule: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Tensor:
    """Compute the confusion matrix [1 + C, 1 + C], image by image with every class at full size.

    See :func:`starseg.engine.evaluate.confusion_matrix`.
    """
    classes = 1 + model.classes
    total = torch.zeros(classes, classes, dtype=torch.int64)
    for batch in batches:
        for image, label in zip(batch.images.split(1), batch.labels.split(1), strict=True):
            predicted = rule(resize(model(model.normalize(image)).logits, label.shape[-2:])).cpu()
            total += multiclass_confusion_matrix(
                predicted, label.long(), classes, ignore_index=IGNORE, validate_args=False
            )
    return total
