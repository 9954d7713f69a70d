"""Samples of a step: images, labels and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from starseg.data.cache import ImageCache
from starseg.data.datasets.base import Split
from starseg.data.images import read_image, read_mask, refuse_other_size
from starseg.data.transforms import eval_transform, train_transform

Kind = Literal["train", "val", "test"]
Epoch = int | str


EXEMPLAR = "exemplar"
"""Name in a batch's extras: [N] bool, which images come from the exemplar memory; only in a step with exemplars."""


@dataclass(frozen=True)
class Batch:
    """Images and labels.

    Attributes:
        images: [N, 3, H, W] uint8 from the loader, normalised floats once on the device.
        labels: [N, H, W] uint8 training ids, 255 ignore.
        indices: [N] int64 positions in the split's file list.
        extras: what else belongs to the images, by name: the maps that the method asks for
            (:meth:`Method.extra_maps <starseg.methods.Method.extra_maps>`, [N, H, W] uint8), and :data:`EXEMPLAR`.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Copy into page-locked memory for non-blocking copies to a GPU; called by the loader."""
        return self.map(lambda values: values.pin_memory())

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed alike."""
        extras = {name: change(values) for name, values in self.extras.items()}
        return Batch(change(self.images), change(self.labels), change(self.indices), extras)


def sample_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends only on ``parts`` (such as seed, step, epoch, sample index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def extra_map(folder: Path, image: Path) -> Path:
    """Path of an image's map in a folder of extra maps: a grey PNG of its name."""
    return folder / f"{image.stem}.png"


def relabel(ids: np.ndarray, table: bytes | None) -> Tensor:
    """Look up ids [H, W] uint8 in a table of 256 bytes, without the 64-bit indices that NumPy would make."""
    found = bytearray(ids) if table is None else bytearray(ids).translate(table)
    return torch.frombuffer(found, dtype=torch.uint8).view(ids.shape)


@dataclass(frozen=True)
class SampleRequest:
    """Request for one sample; a few hundred bytes, sent to the next free worker.

    Attributes:
        image, mask: files.
        index: the image's position in the split's file list.
        exemplar: whether it comes from the exemplar memory; None where the step has none.
        table: 256 bytes, a relabelling.
        crop: side of the square crop; None for the whole image.
        seed: of the augmentation; None for the test transform.
        maps: names and files of grey PNGs that are cropped like the mask; an exemplar's are zero.
    """

    image: Path
    mask: Path
    index: int
    exemplar: bool | None
    table: bytes
    crop: int | None
    seed: int | None
    maps: tuple[tuple[str, Path], ...] = ()

    def read(self, cache: ImageCache | None = None) -> Batch:
        """Make the sample: a :class:`Batch` without the first dimension."""
        image = cache.image(self.image) if cache else read_image(self.image)

        def grey(path: Path, table: bytes | None) -> Tensor:
            mask = relabel(cache.mask(path) if cache else read_mask(path), table)[None]
            refuse_other_size(image.shape[1:], mask.shape[1:], path)
            return mask

        mask = grey(self.mask, self.table)
        if self.maps:
            maps = (torch.zeros_like(mask) if self.exemplar else grey(path, None) for _, path in self.maps)
            mask = torch.cat([mask, *maps])
        if self.crop and self.seed is not None:
            with torch.random.fork_rng(devices=[]):
                # torch.manual_seed would seed the GPUs as well, which nobody restores.
                torch.default_generator.manual_seed(self.seed)
                image, mask = train_transform(image, mask, self.crop)
        elif self.crop:
            image, mask = eval_transform(image, mask, self.crop)
        extras = {name: values for (name, _), values in zip(self.maps, mask[1:], strict=True)}
        if self.exemplar is not None:
            extras[EXEMPLAR] = torch.tensor(self.exemplar)
        return Batch(image, mask[0], torch.tensor(self.index), extras)


class StepDataset:
    """Samples of one step, addressed by (epoch, position); the epoch seeds the augmentation.

    Args:
        split: the files.
        positions: which of them, as :func:`select_images` gives them.
        table: [256] relabelling.
        crop: side of the square crops; None for whole images (tests only).
        seed: of the augmentation, (run seed, step); None for the test transform.
        exemplars: how many of the split's last files are exemplars.
        exemplar_table: [256] relabelling of exemplars, by default ``table``.
        maps: folders of grey PNGs named like the images, by the names of the extras.
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
        maps: Mapping[str, Path] | None = None,
    ) -> None:
        self.split, self.positions, self.crop, self.seed, self.maps = split, positions, crop, seed, maps or {}
        self.exemplars, self.first_exemplar = exemplars, len(split) - exemplars
        # The same bytes in every request: in a batch that is sent, they stand once.
        self.table = table.tobytes()
        self.exemplar_table = self.table if exemplar_table is None else exemplar_table.tobytes()

    def __len__(self) -> int:
        return len(self.positions)

    def request(self, key: tuple[Epoch, int]) -> SampleRequest:
        """Return the request for the sample of an (epoch, position)."""
        epoch, position = key
        index = int(self.positions[position])
        path = self.split.images[index]
        exemplar = index >= self.first_exemplar
        return SampleRequest(
            path,
            self.split.masks[index],
            index,
            exemplar if self.exemplars else None,
            self.exemplar_table if exemplar else self.table,
            self.crop,
            None if self.seed is None else sample_seed(*self.seed, epoch, index),
            tuple((name, extra_map(folder, path)) for name, folder in self.maps.items()),
        )

    def __getitem__(self, key: tuple[Epoch, int]) -> Batch:
        return self.request(key).read()


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
        """Number of batches of an epoch."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def __len__(self) -> int:
        return self.batches_per_epoch * len(self.epochs) - self.start

    def __iter__(self) -> Iterator[list[tuple[Epoch, int]]]:
        if not self.batches_per_epoch:
            return
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
        """Replace the second half of a batch by exemplars."""
        crops, drawn = f"{epoch} at {start}", len(batch) // 2
        draw = np.random.default_rng(sample_seed(*(self.seed or ()), crops))
        rows = draw.choice(self.exemplars, drawn, replace=drawn > self.exemplars)
        return batch[: len(batch) - drawn] + [(crops, self.size + int(i)) for i in rows]
