"""Losses of STAR and Adapter as pure functions (Chen et al., NeurIPS 2023; golden cases in tests/parity).

Shape letters: N images, H W pixels, h w feature cells, D feature channels, K classes, M feature vectors. Logits have no
background channel. Labels are training ids, 0 background, 255 ignore. Keyword arguments select numerical choices of the
published implementation (:class:`starseg.config.Choices`).

``all_reduce_sum`` sums a tensor over processes (:mod:`starseg.losses.reduction`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.losses.reduction import AllReduceSum, identity, mean, ratio
from starseg.ops.bilinear import resize
from starseg.ops.labels import ignored_id
from starseg.ops.upsampled_bce import UpsampledBce
from starseg.tasks import BACKGROUND


def upsample(logits: Tensor, labels: Tensor) -> Tensor:
    """Resize logits [N, C, h, w] to the size of the labels [N, H, W], in float32."""
    return resize(logits.float(), labels.shape[-2:])


def one_hot(labels: Tensor, first_id: int, classes: int) -> Tensor:
    """Return bool masks [N, K, H, W] of the ids ``first_id`` .. ``first_id + classes - 1`` in labels [N, H, W]."""
    ids = torch.arange(first_id, first_id + classes, device=labels.device)
    return labels[:, None] == ids[:, None, None]


def bce_per_class(
    logits: Tensor,
    labels: Tensor,
    first_id: int,
    pos_weight: float = 1.0,
    *,
    ignored_as_negatives: bool = False,
    all_reduce_sum: AllReduceSum = identity,
) -> Tensor:
    """Return the base loss: for each class c, the BCE of its logit against [y = c], averaged over the pixels.

    Args:
        logits: [N, K, h, w] float32 of the new classes; upsampled by :class:`~starseg.ops.upsampled_bce.UpsampledBce`.
        labels: [N, H, W]; old ids are background.
        first_id: training id of channel 0.
        pos_weight: weight of positive pixels.
        ignored_as_negatives: count ignored pixels as negatives; by default they are left out of the loss and its mean.
        all_reduce_sum: sums a tensor over processes.

    Returns:
        [K]; 0 where every pixel is ignored.
    """
    sums = UpsampledBce.apply(logits, labels, first_id, pos_weight, ignored_as_negatives)
    count = labels.numel() if ignored_as_negatives else (labels != ignored_id(labels)).sum()
    return ratio(sums, count, all_reduce_sum)[0]


def negatives_per_class(logits: Tensor, all_reduce_sum: AllReduceSum = identity) -> tuple[Tensor, Tensor]:
    """Return the BCE of logits [M, K] against 0 (L_replay and L_bg).

    Returns:
        [K] means over M, 0 if M is 0; and M. Both are those of all processes.
    """
    return ratio(F.softplus(logits).sum(0), len(logits), all_reduce_sum)


def mix(new: Tensor, replay: Tensor, background: Tensor, replay_weight: Tensor, background_weight: Tensor) -> Tensor:
    """Return mbce = (L_new + w_r L_replay + w_b L_bg) / (1 + w_r + w_b), [K]."""
    total = new + replay_weight * replay + background_weight * background
    return total / (1 + replay_weight + background_weight)


def mixed_bce(
    new: Tensor,
    replayed: Tensor,
    logits: Tensor,
    cells: Tensor,
    background_ratio: float,
    all_reduce_sum: AllReduceSum = identity,
) -> Tensor:
    """Return the class loss of a later step: the batch's base loss, mixed with replayed features and background cells.

    Args:
        new: [K], base loss of the batch (:func:`bce_per_class`).
        replayed: [M, K] logits of the replayed features.
        logits: [N, K, h, w] of the batch.
        cells: [N, h, w] bool, background cells of the batch.
        background_ratio: how many times the background cells count.
        all_reduce_sum: sums a tensor over processes.

    Returns:
        [K].
    """
    replay, replays = negatives_per_class(replayed, all_reduce_sum)
    # Boolean indexing by the cells would synchronise with the GPU to count them.
    negatives = F.softplus(logits).masked_fill_(~cells[:, None], 0)
    background, repeated = ratio(negatives.sum((0, 2, 3)), cells.sum(), all_reduce_sum)
    total = all_reduce_sum(torch.full((), cells.numel(), device=cells.device))
    return mix(new, replay, background, replays / total, background_ratio * repeated / total)


def ocfm(
    features: Tensor,
    old_features: Tensor,
    region: Tensor,
    all_reduce_sum: AllReduceSum = identity,
    epsilon: float = 0.0,
) -> Tensor:
    """Old-class feature maintenance: squared feature change where the previous model predicts an old class.

    Args:
        features: [N, D, h, w] float32.
        old_features: [N, D, h, w] float32 of the previous model.
        region: [N, H, W] bool, [p > 0 and y = 0], with p the previous model's prediction.
        all_reduce_sum: sums a tensor over processes.
        epsilon: added to the denominator once, not once per process (Adapter).

    Returns:
        Scalar sum (x - x_old)^2 M / (D sum M), with M the region resized to h x w; 0 for an empty region.
    """
    mask = resize(region[:, None].to(features.dtype), features.shape[-2:])
    change = ((features - old_features).square().sum(1, keepdim=True) * mask).sum() / features.shape[1]
    (value,), weight = ratio(change[None], mask.sum(), all_reduce_sum)
    return value * weight / (weight + epsilon / features.shape[1]) if epsilon else value


def sad(
    features: Tensor,
    labels: Tensor,
    first_id: int,
    classes: int,
    old_prototypes: Tensor,
    *,
    absent_classes: bool = False,
    epsilon: float = 1e-3,
    all_reduce_sum: AllReduceSum = identity,
) -> Tensor:
    """Similarity-aware discrimination: keep each new class's centre away from the nearest old prototype.

    Args:
        features: [N, D, h, w] float32.
        labels: [N, H, W].
        first_id: training id of the first new class.
        classes: K, the number of new classes.
        old_prototypes: [P, D] unit vectors.
        absent_classes: let a class that is absent from the batch add the constant 1; by default absent classes are left
            out of the mean.
        epsilon: smallest norm by which a vector is divided; it bounds the gradient where a feature vector is (nearly)
            zero.
        all_reduce_sum: sums a tensor over processes.

    Returns:
        Scalar mean over the new classes of 1 / (distance to the nearest old prototype); 0 if there is no old prototype.
    """
    if not len(old_prototypes):
        return features.sum() * 0
    weights = resize(one_hot(labels, first_id, classes).to(features.dtype), features.shape[-2:])
    # Dividing the weights by the norms gives the same sums as dividing the features, without a second feature map.
    norms = features.norm(dim=1, keepdim=True).clamp_min(epsilon)
    sums = all_reduce_sum(((weights / norms).flatten(2) @ features.flatten(2).mT).sum(0))
    distance = torch.cdist(F.normalize(sums, dim=1, eps=epsilon), old_prototypes).amin(1).clamp_min(1e-6)
    if absent_classes:
        return (1 / distance).mean()
    shown = all_reduce_sum(weights.sum((0, 2, 3))) > 0
    return torch.where(shown, 1 / distance, 0).sum() / shown.sum().clamp_min(1)


def uncertainty(logits: Tensor, labels: Tensor, all_reduce_sum: AllReduceSum = identity) -> Tensor:
    """Adapter's uncertainty-aware constraint (Zhu et al., AAAI 2025): widen the margin of the best class.

    Args:
        logits: [N, K, H, W] of all classes.
        labels: [N, H, W].
        all_reduce_sum: sums a tensor over processes.

    Returns:
        Scalar mean of [m (1 - (s1 - s2))]^2, where s1 >= s2 are the two largest sigmoids, s1 without gradient; m is 0
        where the best class is the label or s1 > 0.7, else 1.
    """
    best, second, winner = top_two(logits)
    open_ = (winner + 1 != labels) & (best <= 0.7)
    return mean((open_ * (1 - (best.detach() - second))).square(), all_reduce_sum)


def top_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two largest sigmoids over dimension 1 and the first one's channel; of one class the second is 0."""
    values, winners = logits.sigmoid().topk(min(2, logits.shape[1]), dim=1)
    second = values[:, 1] if values.shape[1] > 1 else torch.zeros_like(values[:, 0])
    return values[:, 0], second, winners[:, 0]


def background_cells(grid_labels: Tensor, grid_old: Tensor) -> Tensor:
    """Return the cells labelled background in which the previous model predicts no class either, [N, h, w] bool."""
    return (grid_labels == BACKGROUND) & (grid_old == BACKGROUND)
