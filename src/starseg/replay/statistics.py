"""Statistics of features in one streaming pass on the stride grid: counts, prototypes, noise and norms.

All sums are kept in float64, so that the order of the batches and the number of processes do not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from starseg.ops.bilinear import channel_chunks, largest, resize_at_support, subsample_to_support
from starseg.ops.labels import ignored_id, signed_ids
from starseg.replay.bank import PrototypeBank
from starseg.tasks import BACKGROUND
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

_EPS = 1e-12


def sample_at_stride(labels: Tensor, stride: int) -> Tensor:
    """Sample labels [N, H, W] at (stride i + stride/2, stride j + stride/2) -> [N, H/stride, W/stride]."""
    return labels[:, stride // 2 :: stride, stride // 2 :: stride]


def count_ids(ids: Tensor, size: int) -> Tensor:
    """Count how often each of 0..size-1 occurs, [size] int64; larger values (255, 65535) are left out."""
    ids = ids.flatten().long()
    return torch.bincount(ids[ids < size], minlength=size)


def old_prediction(logits: Tensor, size: Sequence[int], cells: Sequence[int], threshold: float = 0.5) -> Tensor:
    """Return the previous model's prediction in training: argmax + 1 where its raw logit exceeds ``threshold``, else 0.

    Args:
        logits: [N, C, h, w], upsampled before they are compared.
        size: height and width of the image.
        cells: height and width of the grid of cells on which the prediction is used.
        threshold: threshold on the logit; 0.5 as published (a probability of 0.622).

    Returns:
        [N, H', W'] int64 training ids, at the pixels that :func:`starseg.ops.bilinear.subsample_to_support` keeps.
    """
    maps = logits.float()
    parts = channel_chunks(maps, 4 * cells[0] * cells[1])
    best, winner = largest(resize_at_support(part, size, cells) for part in parts)
    return torch.where(best > threshold, winner + 1, BACKGROUND)


def old_model_labels(
    labels: Tensor, old_logits: Tensor, cells: Sequence[int], threshold: float
) -> tuple[Tensor, Tensor]:
    """Return the labels [N, H, W] and the :func:`old_prediction` of the previous model, both [N, H', W'].

    Both are subsampled to the pixels that a resize to the grid of ``cells`` reads.
    """
    return subsample_to_support(labels, cells), old_prediction(old_logits, labels.shape[1:], cells, threshold)


def grid_predictions(labels: Tensor, old_logits: Tensor, stride: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the labels and the :func:`old_prediction` of the previous model on the grid, both [N, h, w].

    Args:
        labels: [N, H, W].
        old_logits: [N, C, h, w] of the previous model.
        stride: pixels per cell.
        threshold: as in :func:`old_prediction`.
    """
    cells = [side // stride for side in labels.shape[1:]]
    labels, seen = old_model_labels(labels, old_logits, cells, threshold)
    thinned = labels.shape[-1] // cells[-1]
    return sample_at_stride(labels, thinned), sample_at_stride(seen, thinned)


def count_cells(labels: Tensor, old_logits: Tensor, stride: int, ids: int, threshold: float) -> Tensor:
    """Count grid cells by training id, [ids] int64.

    The id of a cell is its label or, where that is background, the previous model's prediction.

    Args:
        labels: [N, H, W].
        old_logits: [N, C, h, w] of the previous model.
        stride: pixels per cell.
        ids: number of training ids, with the background.
        threshold: as in :func:`old_prediction`.
    """
    return count_step(*grid_predictions(labels, old_logits, stride, threshold), ids)


def count_step(labels: Tensor, seen: Tensor, ids: int) -> Tensor:
    """Count cells by their label or, where that is background, by the prediction; see :func:`count_cells`."""
    return count_ids(torch.where(labels == BACKGROUND, seen, labels.long()), ids)


@dataclass
class FeatureStatistics:
    """Sufficient statistics of the features of K new classes, accumulated batch by batch.

    Attributes:
        counts: [1 + K] int64 cells of the background and of each class.
        unit_sum, unit_square_sum: [K, D] float64 sums of the unit features and of their squares.
        norm_sum, norm_square_sum: [K] float64 sums of the feature norms and of their squares.
    """

    counts: Tensor
    unit_sum: Tensor
    unit_square_sum: Tensor
    norm_sum: Tensor
    norm_square_sum: Tensor

    @classmethod
    def zeros(cls, classes: int, channels: int, device: torch.device | str = "cpu") -> FeatureStatistics:
        """Return the statistics of no features."""

        def double(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        counts = torch.zeros(1 + classes, dtype=torch.int64, device=device)
        return cls(counts, double(classes, channels), double(classes, channels), double(classes), double(classes))

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: [N, D, h, w].
            labels: [N, h, w] on the grid: 0 background, 1..K the new classes, 255 ignore.
        """
        classes = len(self.counts) - 1
        labels = signed_ids(labels.flatten())
        self.counts += count_ids(labels, classes + 1)
        cells = (labels != BACKGROUND) & (labels != ignored_id(labels))
        rows = labels[cells] - 1
        vectors = features.movedim(1, -1).flatten(0, 2)[cells].double()
        norms = vectors.norm(dim=1)
        unit = vectors / norms.clamp_min(_EPS)[:, None]
        self.unit_sum.index_add_(0, rows, unit)
        self.unit_square_sum.index_add_(0, rows, unit.square())
        self.norm_sum.index_add_(0, rows, norms)
        self.norm_square_sum.index_add_(0, rows, norms.square())

    def reduce(self, all_reduce_sum: Callable[[Tensor], Tensor]) -> FeatureStatistics:
        """Return the statistics of all processes; ``all_reduce_sum`` sums one tensor over them."""
        return FeatureStatistics(*(all_reduce_sum(getattr(self, f.name)) for f in fields(self)))

    def finish(self, old: PrototypeBank | None = None, *, noise_around_row: bool = False) -> PrototypeBank:
        """Return the bank entries of the new classes; a class without a cell gets zeros.

        Args:
            old: bank of the old classes, if there are any.
            noise_around_row: measure the noise of the k-th new class around row k of the [old; new] prototypes, as the
                published code does, instead of around its own prototype.
        """
        count = self.counts[1:].double()
        safe = count.clamp_min(1)[:, None]
        present = (count > 0)[:, None]
        prototypes = self.unit_sum / self.unit_sum.norm(dim=1, keepdim=True).clamp_min(_EPS)
        centre = prototypes
        if noise_around_row and old is not None:
            centre = torch.cat([old.prototypes.to(prototypes), prototypes])[: len(prototypes)]
        square = self.unit_square_sum / safe - 2 * centre * self.unit_sum / safe + centre.square()
        mean = self.norm_sum / safe[:, 0]
        spread = (self.norm_square_sum - count * mean.square()).clamp_min(0) / (count - 1).clamp_min(1)
        noise = square.clamp_min(0).sqrt() * present
        return PrototypeBank(
            counts=self.counts.float(),
            prototypes=prototypes.float(),
            noise=noise.float(),
            norm_mean=mean.float(),
            norm_std=torch.where(count > 1, spread.sqrt(), 0).float(),
        )


def measure(cells: Iterable[tuple[Tensor, Tensor]], first: int, classes: int) -> FeatureStatistics:
    """Return the statistics of the new classes' features.

    Args:
        cells: at least one pair of features [N, D, h, w] and training ids on their grid [N, h, w].
        first: training id of the first new class, which becomes 1; ids of other classes are left unchanged.
        classes: K, the number of new classes.
    """
    statistics: FeatureStatistics | None = None
    for features, labels in cells:
        labels = signed_ids(labels)
        new = (labels >= first) & (labels < first + classes)
        statistics = statistics or FeatureStatistics.zeros(classes, features.shape[1], features.device)
        statistics.update(features, torch.where(new, labels - first + 1, labels))
    assert statistics is not None, "a step has at least one image"
    return statistics


def square_angles(cells: Iterable[tuple[Tensor, Tensor]], first: int, prototypes: Tensor) -> Tensor:
    """Return the sum of the squared angles between the new classes' features and their prototype, [K] float64.

    Args:
        cells: as in :func:`measure`.
        first: training id of the first new class.
        prototypes: [K, D] of the new classes.
    """
    total = torch.zeros(len(prototypes), dtype=torch.float64, device=prototypes.device)
    for features, labels in cells:
        rows = labels.flatten().long() - first
        new = (rows >= 0) & (rows < len(prototypes))
        vectors = F.normalize(features.movedim(1, -1).flatten(0, 2)[new].double(), dim=1)
        cosine = (vectors * prototypes[rows[new]].double()).sum(1).clamp(-1, 1)
        total.index_add_(0, rows[new], cosine.acos().square())
    return total
