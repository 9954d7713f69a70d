"""Class losses and distillation losses of softmax and sigmoid classifiers, as pure functions.

Golden cases are in tests/parity. Shape letters: N images, H W pixels, h w feature cells, D feature channels, C logit
channels (of a softmax, channel 0 is the background), C° logit channels of the previous model, K classes, L entries of
an embedding. Labels are training ids, 0 background, 255 ignore; they are also the channel indices of a softmax.
``all_reduce_sum`` sums a tensor over processes (:mod:`starseg.losses.reduction`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.losses.reduction import AllReduceSum, identity, mean, ratio
from starseg.ops.labels import ignored_id, signed_ids

_SCALES = (1, 2, 4)


def cross_entropy_map(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of every pixel, 0 where it is ignored: [N, C, H, W], [N, H, W] -> [N, H, W]."""
    return F.cross_entropy(logits, labels.long(), ignore_index=ignored_id(labels), reduction="none")


def unbiased_cross_entropy_map(logits: Tensor, labels: Tensor, old: int) -> Tensor:
    """Return MiB's cross-entropy of every pixel, in which the background includes the old classes.

    Source: Cermelli et al., CVPR 2020, eq. 5.

    Args:
        logits: [N, C, H, W].
        labels: [N, H, W]; ids below ``old`` are background.
        old: C°, the number of leading channels whose probabilities add up to the background's.

    Returns:
        [N, H, W], 0 where a pixel is ignored.
    """
    background = logits[:, :old].logsumexp(1, keepdim=True)
    merged = torch.cat([background, logits[:, old:]], 1)
    labels, ignored = signed_ids(labels), ignored_id(labels)
    shifted = (labels - old + 1).clamp_min(0)
    return cross_entropy_map(merged, torch.where(labels == ignored, ignored, shifted))


def softmax_kd(
    logits: Tensor, old_logits: Tensor, alpha: float = 1.0, all_reduce_sum: AllReduceSum = identity
) -> Tensor:
    """Return LwF's distillation loss, -mean over pixels and C° channels of q log softmax(first C° logits).

    Args:
        logits: [N, C, H, W].
        old_logits: [N, C°, H, W], z° below.
        alpha: sharpness of the target q = softmax(alpha z°).
        all_reduce_sum: sums a tensor over processes.
    """
    log_p = logits[:, : old_logits.shape[1]].log_softmax(1)
    return -mean((old_logits * alpha).softmax(1) * log_p, all_reduce_sum)


def unbiased_kd(
    logits: Tensor, old_logits: Tensor, alpha: float = 1.0, all_reduce_sum: AllReduceSum = identity
) -> Tensor:
    """Return MiB's distillation loss (eq. 8), in which the background's probability includes the new classes'.

    The arguments are those of :func:`softmax_kd`.
    """
    old = old_logits.shape[1]
    background = torch.cat([logits[:, :1], logits[:, old:]], 1).logsumexp(1, keepdim=True)
    log_p = torch.cat([background, logits[:, 1:old]], 1) - logits.logsumexp(1, keepdim=True)
    return -mean((old_logits * alpha).softmax(1) * log_p, all_reduce_sum)


def sigmoid_kd(logits: Tensor, old_logits: Tensor, all_reduce_sum: AllReduceSum = identity) -> Tensor:
    """Return each class's BCE against the previous model's probability, a mean over pixels: two [N, K, H, W] -> [K]."""
    loss = F.binary_cross_entropy_with_logits(logits, old_logits.sigmoid(), reduction="none")
    return ratio(loss.sum((0, 2, 3)), loss[:, 0].numel(), all_reduce_sum)[0]


def sign_split(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Split logits into the contributions of positive and of negative weights (Baek et al., NeurIPS 2022, eq. 5).

    Args:
        features: [N, D, h, w].
        weight: [K, D, 1, 1] weights of the class heads.

    Returns:
        Two [N, K, h, w]; their sum is the logit without the bias.
    """
    return F.conv2d(features, weight.clamp_min(0)), F.conv2d(features, weight.clamp_max(0))


def local_pod(maps: Tensor) -> Tensor:
    """Return PLOP's pooled embedding (Douillard et al., CVPR 2021, eq. 4): [N, D, h, w] -> [N, L].

    For each s in 1, 2, 4 the map is divided into s x s regions of floor(h / s) x floor(w / s) cells, leaving out the
    remainder. The embedding concatenates the row means and the column means of every region. The published code accepts
    square maps only.
    """
    n, _, h, w = maps.shape
    parts = []
    for scale in _SCALES:
        height, width = h // scale, w // scale
        for i in range(scale):
            for j in range(scale):
                region = maps[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width]
                parts += [region.mean(3).reshape(n, -1), region.mean(2).reshape(n, -1)]
    return torch.cat(parts, 1)


def pooled_distance(
    new: Tensor, old: Tensor, pool: Callable[[Tensor], Tensor], all_reduce_sum: AllReduceSum = identity
) -> Tensor:
    """Return the mean over images of the L2 distance between two maps [N, D, h, w], squared and then pooled."""
    distance = (pool(new.square()) - pool(old.square())).norm(dim=1)
    return mean(distance, all_reduce_sum)


def pooled_distillation(
    new: Sequence[Tensor],
    old: Sequence[Tensor],
    weights: Sequence[float],
    growth: float,
    pool: Callable[[Tensor], Tensor] = local_pod,
    all_reduce_sum: AllReduceSum = identity,
) -> Tensor:
    """Return the weighted mean of the pooled distances of several maps (PLOP, eq. 6).

    Args:
        new: maps [N, D, h, w] of the new model, and last its logits [N, C, h, w] at feature resolution; the new
            classes' logits are added to channel 0, the background.
        old: the same maps of the previous model, with logits [N, C°, h, w].
        weights: one per map.
        growth: number of all classes, with the background, per new class; the result is scaled by its square root.
        pool: [N, D, h, w] -> [N, L].
        all_reduce_sum: sums a tensor over processes.
    """
    logits, channels = new[-1], old[-1].shape[1]
    background = logits[:, :1] + logits[:, channels:].sum(1, keepdim=True)
    maps = [*new[:-1], torch.cat([background, logits[:, 1:channels]], 1)]
    terms = [w * pooled_distance(a, b, pool, all_reduce_sum) for w, a, b in zip(weights, maps, old, strict=True)]
    return math.sqrt(growth) * torch.stack(terms).mean()
