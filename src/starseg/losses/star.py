"""Loss terms as pure functions (Chen et al., NeurIPS 2023; golden cases in tests/parity).

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
from starseg.ops.upsampled_bce import UpsampledBce
from starseg.tasks import BACKGROUND, IGNORE


def upsample(logits: Tensor, labels: Tensor) -> Tensor:
    """Upsample logits [N, C, h, w] in float32 to the size of the labels [N, H, W]."""
    return resize(logits.float(), labels.shape[-2:])


def one_hot(labels: Tensor, first_id: int, classes: int) -> Tensor:
    """Return masks [N, K, H, W] bool of ids ``first_id`` .. ``first_id + classes - 1`` in labels [N, H, W]."""
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
    """Base loss: per class c, BCE of its logit against [y = c], averaged over the pixels.

    Args:
        logits: [N, K, h, w] float32 of the new classes; upsampled by :class:`~starseg.ops.upsampled_bce.UpsampledBce`.
        labels: [N, H, W]; old ids are background.
        first_id: training id of channel 0.
        pos_weight: weight of positive pixels.
        ignored_as_negatives: ignored pixels count as negatives; by default they leave the loss and its mean.
        all_reduce_sum: over processes.

    Returns:
        [K]; 0 where every pixel is ignored.
    """
    sums = UpsampledBce.apply(logits, labels, first_id, pos_weight, ignored_as_negatives)
    count = labels.numel() if ignored_as_negatives else (labels != IGNORE).sum()
    return ratio(sums, count, all_reduce_sum)[0]


def negatives_per_class(logits: Tensor, all_reduce_sum: AllReduceSum = identity) -> tuple[Tensor, Tensor]:
    """BCE against 0 of [M, K] logits (L_replay and L_bg): its mean over M, [K], 0 for M = 0; and M of all processes."""
    return ratio(F.softplus(logits).sum(0), len(logits), all_reduce_sum)


def mix(new: Tensor, replay: Tensor, background: Tensor, replay_weight: Tensor, background_weight: Tensor) -> Tensor:
    """Compute mbce = (L_new + w_r L_replay + w_b L_bg) / (1 + w_r + w_b), [K]."""
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
    """Class loss of a later step: a batch's own, mixed with replayed features and repeated background cells.

    Args:
        new: [K], the batch's own (:func:`bce_per_class`).
        replayed: [M, K] logits of the replayed features.
        logits: [N, K, h, w] of the batch.
        cells: [N, h, w] bool, its background cells.
        background_ratio: how many times these count.
        all_reduce_sum: over processes.

    Returns:
        [K].
    """
    replay, replays = negatives_per_class(replayed, all_reduce_sum)
    # Indexing by the cells would wait for a GPU to count them.
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
    """Old-class feature maintenance: squared feature change where the old model sees an old class.

    Args:
        features: [N, D, h, w] float32.
        old_features: likewise, of the old model.
        region: [N, H, W] bool, [p > 0 and y = 0].
        all_reduce_sum: over processes.
        epsilon: added to the denominator once for all processes (Adapter).

    Returns:
        Scalar sum (x - x_old)^2 M / (D sum M), M the region resized to h x w; 0 for an empty region.
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
    """Similarity-aware discrimination: keeps each new class's centre away from the nearest old prototype.

    Args:
        features: [N, D, h, w] float32.
        labels: [N, H, W].
        first_id: training id of the first new class.
        classes: how many new classes, K.
        old_prototypes: [P, D] unit vectors.
        absent_classes: a class absent from the batch adds the constant 1; by default absent classes leave the mean.
        epsilon: smallest norm by which a vector is divided; it bounds the gradient where a feature vector is (nearly)
            zero.
        all_reduce_sum: over processes.

    Returns:
        Scalar mean over the new classes of 1 / (distance to the nearest old prototype); 0 if there is none.
    """
    if not len(old_prototypes):
        return features.sum() * 0
    weights = resize(one_hot(labels, first_id, classes).to(features.dtype), features.shape[-2:])
    # Weights are divided by the features' norms in place of the features: the same sums, and no second feature map.
    norms = features.norm(dim=1, keepdim=True).clamp_min(epsilon)
    sums = all_reduce_sum(((weights / norms).flatten(2) @ features.flatten(2).mT).sum(0))
    distance = torch.cdist(F.normalize(sums, dim=1, eps=epsilon), old_prototypes).amin(1).clamp_min(1e-6)
    if absent_classes:
        return (1 / distance).mean()
    shown = all_reduce_sum(weights.sum((0, 2, 3))) > 0
    return torch.where(shown, 1 / distance, 0).sum() / shown.sum().clamp_min(1)


def uncertainty(logits: Tensor, labels: Tensor, all_reduce_sum: AllReduceSum = identity) -> Tensor:
    """Adapter's constraint on uncertain pixels (Zhu et al., AAAI 2025): widens the lead of the best class.

    Args:
        logits: [N, K, H, W] of all classes.
        labels: [N, H, W].
        all_reduce_sum: over processes.

    Returns:
        Scalar mean of [m (1 - (s1 - s2))]^2, s1 >= s2 the two largest sigmoids, s1 without gradient; m is 0 where the
        best class is the label or s1 > 0.7, else 1.
    """
    best, second, winner = top_two(logits)
    open_ = (winner + 1 != labels) & (best <= 0.7)
    return mean((open_ * (1 - (best.detach() - second))).square(), all_reduce_sum)


def top_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two largest sigmoids over dimension 1 and the first one's channel; of one class the second is 0."""
    values, winners = logits.sigmoid().topk(min(2, logits.shape[1]), dim=1)
    second = values[:, 1] if values.shape[1] > 1 else torch.zeros_like(values[:, 0])
    return values[:, 0], second, winners[:, 0]


def background_cells(grid_labels: Tensor, grid_old: Tensor) -> Tensor:
    """Return the cells [N, h, w] bool that both the labels and the old model call background."""
    return (grid_labels == BACKGROUND) & (grid_old == BACKGROUND)
