"""The loss path written densely and literally, what `starseg bench` and the tests compare with.

Every logit of every class is brought to image size, one-hot targets are made there, and autograd keeps what it needs;
vectorised, float32. The formulas are those of REFERENCE, "Each iteration", by default (not ``published``) and for one
process. Shape letters: N images, K classes, H W pixels, h w feature cells, D feature channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.bilinear import resize
from starseg.data.step import Batch
from starseg.losses import mix, one_hot
from starseg.methods.base import StepContext
from starseg.methods.star import StarOptions
from starseg.models import Output
from starseg.replay.bank import PrototypeBank
from starseg.replay.plan import ReplayPlan
from starseg.tasks import BACKGROUND, IGNORE

_EPS = 1e-3


def dense_bce(logits: Tensor, labels: Tensor, first_id: int, pos_weight: float, published: bool = False) -> Tensor:
    """[K] base loss of logits [N, K, H, W] at the labels' size; see :func:`starseg.losses.bce_per_class`."""
    target = one_hot(labels, first_id, logits.shape[1]).to(logits.dtype)
    weight = torch.as_tensor(pos_weight, dtype=logits.dtype, device=logits.device)
    loss = F.binary_cross_entropy_with_logits(logits, target, pos_weight=weight, reduction="none")
    if published:
        return loss.mean((0, 2, 3))
    valid = (labels != IGNORE)[:, None]
    return (loss * valid).sum((0, 2, 3)) / valid.sum().clamp_min(1)


def dense_old_prediction(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """[N, H, W] training ids the old model sees, of logits [N, K, H, W] at image size."""
    best, winner = logits.max(1)
    return torch.where(best > threshold, winner + 1, BACKGROUND)


def dense_ocfm(features: Tensor, old_features: Tensor, region: Tensor) -> Tensor:
    """Old-class feature maintenance over a region [N, H, W]."""
    mask = resize(region[:, None].float(), features.shape[-2:])
    return ((features - old_features).square() * mask).sum() / (features.shape[1] * mask.sum()).clamp_min(1e-12)


def dense_sad(features: Tensor, labels: Tensor, first_id: int, classes: int, old_prototypes: Tensor) -> Tensor:
    """Similarity-aware discrimination from labels [N, H, W]."""
    weights = resize(one_hot(labels, first_id, classes).float(), features.shape[-2:])
    sums = torch.einsum("nkhw,ndhw->kd", weights, F.normalize(features, dim=1, eps=_EPS))
    distance = torch.cdist(F.normalize(sums, dim=1, eps=_EPS), old_prototypes).amin(1).clamp_min(1e-6)
    shown = weights.sum((0, 2, 3)) > 0
    return torch.where(shown, 1 / distance, 0).sum() / shown.sum().clamp_min(1)


def dense_base(ctx: StepContext, options: StarOptions, batch: Batch, output: Output) -> Tensor:
    """STAR's loss of step 0."""
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
    """STAR's loss of a later step; ``output.extra_logits`` are those of the replayed features."""
    labels, stride, known = batch.labels, ctx.model.output_stride, ctx.old_classes
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
    apart = dense_sad(output.features, labels, ctx.first_new, ctx.new_classes, bank.prototypes[bank.present])
    return options.mbce * mixed.sum() + options.ocfm * kept + options.sad * apart
