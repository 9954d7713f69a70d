"""What one step sees: which images, with which labels, in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from starseg.data.dataset import Split
from starseg.data.files import read_image, read_mask, refuse_other_size
from starseg.data.transforms import test_transform, train_transform
from starseg.tasks import BACKGROUND, IGNORE, TaskSequence

Kind = Literal["train", "val", "test"]
Epoch = int | str


@dataclass(frozen=True)
class Batch:
    """Images and labels.

    Attributes:
        images: [N, 3, H, W] uint8 from the loader, normalised floats once on the device.
        labels: [N, H, W] uint8 training ids, 255 ignore.
        indices: [N] int64 positions in the split's file list.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.images)


def select_images(pixels: np.ndarray, task: TaskSequence, step: int, kind: Kind) -> np.ndarray:
    """Positions of the images that a step sees (REFERENCE, "The problem").

    Args:
        pixels: [N, 256] class index.
        task: the task.
        step: the step.
        kind: "train" and "val" need a pixel of a new class (disjoint training moreover no class of a later step or
            outside the task), "test" one of any class seen so far.

    Returns:
        int64, ascending.
    """
    present = pixels > 0
    wanted = task.seen(step) if kind == "test" else task.new(step)
    keep = present[:, list(wanted)].any(1)
    if kind == "train" and task.setting == "disjoint":
        allowed = [BACKGROUND, IGNORE, *task.seen(step)]
        keep &= ~np.delete(present, allowed, axis=1).any(1)
    return np.flatnonzero(keep)


def sample_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on nothing but ``parts`` (say seed, step, epoch, sample index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class StepDataset(Dataset[Batch]):
    """Samples of one step, addressed by (epoch, position); the epoch seeds the augmentation.

    Args:
        split: the files.
        positions: which of them, as :func:`select_images` gives them.
        table: [256] relabelling.
        crop: side of the square crops; None for whole images (tests only).
        seed: of the augmentation, (run seed, step); None for the test transform.
    """

    def __init__(
        self,
        split: Split,
        positions: np.ndarray,
        table: np.ndarray,
        crop: int | None,
        seed: tuple[int, ...] | None,
    ) -> None:
        self.split, self.positions, self.table, self.crop, self.seed = split, positions, table, crop, seed

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: tuple[Epoch, int]) -> Batch:
        epoch, position = key
        index = int(self.positions[position])
        image = read_image(self.split.images[index])
        mask = torch.from_numpy(self.table[read_mask(self.split.masks[index])])[None]
        refuse_other_size(image.shape[1:], mask.shape[1:], self.split.masks[index])
        if self.seed is not None and self.crop:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sample_seed(*self.seed, epoch, index))
                image, mask = train_transform(image, mask, self.crop)
        elif self.crop:
            image, mask = test_transform(image, mask, self.crop)
        return Batch(image, mask[0], torch.tensor(index))


class EpochSampler(Sampler[list[tuple[Epoch, int]]]):
    """Batches of (epoch, position) over a range of epochs, so that one loader and its workers serve a whole step.

    Args:
        size: number of samples.
        batch_size: samples a batch.
        epochs: which epochs to run through; a name ("after") is an epoch with crops of its own.
        seed: of the order, (run seed, step); None keeps the natural order.
        drop_last: leave out each epoch's incomplete batch.
        start: how many batches to leave out, those that a broken run has seen.
        rank, world: this process takes every ``world``-th sample of each batch, from ``rank`` on.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        epochs: Sequence[Epoch],
        seed: tuple[int, ...] | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        self.size, self.batch_size, self.epochs, self.seed = size, batch_size, epochs, seed
        self.drop_last, self.rank, self.world, self.start = drop_last, rank, world, start

    @property
    def batches_per_epoch(self) -> int:
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def __len__(self) -> int:
        return self.batches_per_epoch * len(self.epochs) - self.start

    def __iter__(self) -> Iterator[list[tuple[Epoch, int]]]:
        seen, rest = divmod(self.start, self.batches_per_epoch)
        for epoch in self.epochs[seen:]:
            order = np.arange(self.size)
            if self.seed is not None:
                order = np.random.default_rng(sample_seed(*self.seed, epoch)).permutation(self.size)
            first = rest if epoch == self.epochs[seen] else 0
            for number in range(first, self.batches_per_epoch):
                start = number * self.batch_size
                if len(share := order[start : start + self.batch_size][self.rank :: self.world]):
                    yield [(epoch, int(i)) for i in share]


def collate(samples: list[Batch]) -> Batch:
    return Batch(*(torch.stack([getattr(s, f) for s in samples]) for f in ("images", "labels", "indices")))


def make_loader(dataset: StepDataset, sampler: EpochSampler, workers: int) -> DataLoader[Batch]:
    """A loader of :class:`Batch` over all the sampler's epochs."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
