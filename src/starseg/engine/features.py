"""Features of augmented crops, held in memory for stages in which the feature map does not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from starseg.data.samples import FEATURES, ROWS, Batch, sample_seed
from starseg.models import Segmenter
from starseg.replay.statistics import sample_at_stride
from starseg.utils.precision import Precision

MAX_CELLS = 2_000_000
"""Largest number of feature cells held by a process: 1 GB for 256 channels in half precision."""


@dataclass(frozen=True)
class FeatureCache:
    """Features of this process's share of the crops of a step.

    Attributes:
        features: [n, D, c, 1] in half precision; the c cells of a crop are all of its cells, or a random choice. The
            channels of a cell lie together in memory, as the classifier reads them.
        labels: [n, c, 1] uint8 training ids.
        indices: [n] positions of the images in the split's file list.
    """

    features: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, rows: Tensor | slice, device: torch.device) -> Batch:
        """Return the crops in ``rows`` as a batch without images, with features in single precision on the device.

        The batch is pinned for a GPU, because copies from other memory wait for it.
        """
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        none = torch.zeros(len(rows), 3, 0, 0, dtype=torch.uint8)
        features = self.features.movedim(1, -1).index_select(0, rows).movedim(-1, 1)
        batch = Batch(none, self.labels[rows], self.indices[rows], {FEATURES: features, ROWS: rows})
        if device.type == "cuda":
            batch = batch.pin_memory()
        return replace(
            batch, extras={**batch.extras, FEATURES: batch.extras[FEATURES].to(device, non_blocking=True).float()}
        )

    def ordered(self, size: int, device: torch.device) -> Iterator[Batch]:
        """Yield all crops in batches of ``size``, on the device."""
        for start in range(0, len(self), size):
            batch = self.batch(slice(start, start + size), device)
            yield batch.map(lambda values: values.to(device))


def features_autocast(precision: Precision, fabric: Fabric) -> Callable[[], AbstractContextManager[object]]:
    """Return the context manager of forward passes whose features are cached; `auto` is the precision of training."""
    if precision == "auto":
        return fabric.autocast
    return partial(torch.autocast, fabric.device.type, torch.bfloat16, enabled=precision == "bf16")


def compute_features(
    model: Segmenter,
    batches: Iterable[Batch],
    samples: int,
    autocast: Callable[[], AbstractContextManager[object]],
    seed: int,
    cells: int | None = None,
) -> FeatureCache:
    """Compute the features of crops.

    Args:
        model: network in eval mode.
        batches: normalised batches. A CPU processes them in parts whose maps stay in its cache.
        samples: an upper bound of the number of their images.
        autocast: context manager for the forward passes.
        seed: seed of the choice of cells if there are more than :data:`MAX_CELLS`.
        cells: number of cells to keep of a crop; all by default.
    """
    draw, parts = torch.Generator().manual_seed(seed), []
    for batch in batches:
        with autocast():
            images = batch.images.tensor_split(len(model.parts(batch.images)))
            features = torch.cat([model(part).features for part in images])
        labels = sample_at_stride(batch.labels, model.feature_stride).flatten(1).cpu()
        vectors = features.to(torch.float16).flatten(2).movedim(1, 2).cpu()
        there = labels.shape[1]
        kept = max(1, min(cells or there, MAX_CELLS // max(1, samples)))
        if kept < there:
            chosen = torch.stack([torch.randperm(there, generator=draw)[:kept] for _ in labels])
            labels = labels.gather(1, chosen)
            vectors = vectors.gather(1, chosen[..., None].expand(-1, -1, vectors.shape[2]))
        parts.append((vectors, labels[..., None], batch.indices.cpu()))
    vectors, labels, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return FeatureCache(vectors.movedim(2, 1)[..., None], labels, indices)


@dataclass(frozen=True)
class CachedEpochs:
    """Batches of cached crops in the order of epochs.

    The order depends on (seed, step, epoch) alone. Every process yields ``iterations`` batches in each epoch, repeating
    crops where its share has too few.

    Attributes:
        cache: the crops of this process.
        size: crops of a batch in this process.
        epochs, iterations: number of epochs, and of batches in each.
        seed: (run seed, step, rank).
        device: device of the batches.
        start: number of batches to skip.
    """

    cache: FeatureCache
    size: int
    epochs: int
    iterations: int
    seed: tuple[int, ...]
    device: torch.device
    start: int = 0

    def __len__(self) -> int:
        return self.epochs * self.iterations - self.start

    def __iter__(self) -> Iterator[Batch]:
        first, rest = divmod(self.start, self.iterations)
        for epoch in range(first, self.epochs):
            order = np.random.default_rng(sample_seed(*self.seed, epoch)).permutation(len(self.cache))
            order = np.resize(order, self.size * self.iterations)
            for number in range(rest if epoch == first else 0, self.iterations):
                rows = torch.from_numpy(order[number * self.size : (number + 1) * self.size])
                yield self.cache.batch(rows, self.device)
