"""What one step sees: which images, with which labels, in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from starseg.data.cache import ImageCache
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
        saliency: [N, H, W] uint8 maps, where the method asks for them.
        exemplar: [N] bool, which images come from the exemplar memory; None: not known.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    saliency: Tensor | None = None
    exemplar: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """In page-locked memory, from which copies to a GPU do not block; the loader calls this."""
        columns = {f.name: getattr(self, f.name) for f in fields(Batch)}
        return Batch(**{name: values.pin_memory() for name, values in columns.items() if values is not None})


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


def relabel(ids: np.ndarray, table: np.ndarray | None) -> Tensor:
    """A copy of ids [H, W] uint8, looked up in a [256] uint8 table; as bytes, since NumPy would make 64-bit indices."""
    found = bytearray(ids) if table is None else bytearray(ids).translate(table.tobytes())
    return torch.frombuffer(found, dtype=torch.uint8).view(ids.shape)


class StepDataset(Dataset[Batch]):
    """Samples of one step, addressed by (epoch, position); the epoch seeds the augmentation.

    Args:
        split: the files.
        positions: which of them, as :func:`select_images` gives them.
        table: [256] relabelling.
        crop: side of the square crops; None for whole images (tests only).
        seed: of the augmentation, (run seed, step); None for the test transform.
        exemplars: how many of the split's last files are exemplars.
        exemplar_table: [256] relabelling of exemplars, by default ``table``.
        saliency: folder of grey PNGs named like the images, cropped alike; an exemplar's is zero.
        cache: keeps what was decoded.
    """

    def __init__(
        self,
        split: Split,
        positions: np.ndarray,
        table: np.ndarray,
        crop: int | None,
        seed: tuple[int, ...] | None,
        exemplars: int = 0,
        exemplar_table: np.ndarray | None = None,
        saliency: Path | None = None,
        cache: ImageCache | None = None,
    ) -> None:
        self.split, self.positions, self.table, self.crop, self.seed = split, positions, table, crop, seed
        self.first_exemplar = len(split) - exemplars
        self.exemplar_table = table if exemplar_table is None else exemplar_table
        self.saliency, self.cache = saliency, cache

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, key: tuple[Epoch, int]) -> Batch:
        epoch, position = key
        index = int(self.positions[position])
        path = self.split.images[index]
        image = self.cache.image(path) if self.cache else read_image(path)
        exemplar = index >= self.first_exemplar
        mask = self._read(self.split.masks[index], image, self.exemplar_table if exemplar else self.table)
        if self.saliency:
            grey = self.saliency / f"{path.stem}.png"
            mask = torch.cat([mask, torch.zeros_like(mask) if exemplar else self._read(grey, image)])
        if self.seed is not None and self.crop:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed the GPUs as well, which nobody restores.
                torch.default_generator.manual_seed(sample_seed(*self.seed, epoch, index))
                image, mask = train_transform(image, mask, self.crop)
        elif self.crop:
            image, mask = test_transform(image, mask, self.crop)
        saliency = mask[1] if self.saliency else None
        return Batch(image, mask[0], torch.tensor(index), saliency, torch.tensor(exemplar))

    def _read(self, path: Path, image: Tensor, table: np.ndarray | None = None) -> Tensor:
        values = self.cache.mask(path) if self.cache else read_mask(path)
        mask = relabel(values, table)[None]
        refuse_other_size(image.shape[1:], mask.shape[1:], path)
        return mask


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
        exemplars: how many samples follow the first ``size``; half of every batch is drawn from them, with crops of
            their own in every batch.
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
        exemplars: int = 0,
    ) -> None:
        self.exemplars = exemplars
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
                batch: list[tuple[Epoch, int]] = [(epoch, int(i)) for i in order[start : start + self.batch_size]]
                if self.exemplars:
                    batch = self._mix(batch, epoch, start)
                if share := batch[self.rank :: self.world]:
                    yield share

    def _mix(self, batch: list[tuple[Epoch, int]], epoch: Epoch, start: int) -> list[tuple[Epoch, int]]:
        """A batch with its second half replaced by exemplars."""
        crops, drawn = f"{epoch} at {start}", len(batch) // 2
        draw = np.random.default_rng(sample_seed(*(self.seed or ()), crops))
        rows = draw.choice(self.exemplars, drawn, replace=drawn > self.exemplars)
        return batch[: len(batch) - drawn] + [(crops, self.size + int(i)) for i in rows]


def collate(samples: list[Batch]) -> Batch:
    """One batch of samples, in a worker straight in shared memory; images channels last, as the network takes them."""
    columns = {f.name: [getattr(s, f.name) for s in samples] for f in fields(Batch)}
    columns["images"] = [image.permute(1, 2, 0) for image in columns["images"]]
    found = {name: default_collate(values) for name, values in columns.items() if values[0] is not None}
    return Batch(**found | {"images": found["images"].permute(0, 3, 1, 2)})


def make_loader(dataset: StepDataset, sampler: EpochSampler, workers: int) -> DataLoader[Batch]:
    """A loader of :class:`Batch` over all the sampler's epochs."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        # A forked worker shares its parent's cache.
        multiprocessing_context="fork" if workers and dataset.cache else None,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
