"""Samples and batches of a step: labels, augmentation and order."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from starseg.data.cache import ImageCache
from starseg.data.datasets.base import Split
from starseg.data.images import read_image, read_mask, read_scaled, refuse_other_size, scalable_size
from starseg.data.transforms import draw_crop, eval_transform

Epoch = int | str
_NARROW = 256


EXEMPLAR = "exemplar"
"""Key in a batch's extras: [N] bool, whether an image is from the exemplar memory; only in a step with exemplars."""
FEATURES = "features"
"""Key of feature maps that replace the images of a batch, [N, D, h, w]; the labels are then [N, h, w]."""
ROWS = "rows"
"""Key of the positions [N] of a batch's crops among those whose features the engine holds in memory."""
SALIENCY = "saliency"
"""Key of saliency maps in a batch's extras."""


@dataclass(frozen=True)
class Batch:
    """A batch of images and labels.

    Attributes:
        images: [N, 3, H, W], uint8 as loaded, normalised floats after the transfer to the device.
        labels: [N, H, W] uint8 training ids, 255 ignored; int32 and 65535 on data sets with more than 254 classes.
        indices: [N] int64 positions in the split's file list.
        extras: further tensors by name: the maps that the method requests
            (:meth:`Method.extra_maps <starseg.methods.Method.extra_maps>`, [N, H, W] uint8) and :data:`EXEMPLAR`.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Copy the batch to page-locked memory, which allows non-blocking copies to a GPU; called by the loader."""
        return self.map(lambda values: values.pin_memory())

    @property
    def saliency(self) -> Tensor | None:
        """Deprecated: the saliency maps in :attr:`extras`; None if there are none."""
        return self._extra(SALIENCY)

    @property
    def exemplar(self) -> Tensor | None:
        """Deprecated: the exemplar flags in :attr:`extras`; None in a step without exemplars."""
        return self._extra(EXEMPLAR)

    def _extra(self, name: str) -> Tensor | None:
        warnings.warn(f"Batch.{name} is now Batch.extras[{name!r}]", DeprecationWarning, stacklevel=3)
        return self.extras.get(name)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor of the batch."""
        extras = {name: change(values) for name, values in self.extras.items()}
        return Batch(change(self.images), change(self.labels), change(self.indices), extras)


def sample_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed that depends only on ``parts``, such as (seed, step, epoch, sample index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def extra_map(folder: Path, image: Path) -> Path:
    """Return the path of an image's map in a folder of extra maps: a grey PNG with the stem of the image."""
    return folder / f"{image.stem}.png"


def relabel(ids: np.ndarray, table: bytes | None) -> Tensor:
    """Copy ids [H, W] uint8, translated by a table of 256 bytes (NumPy would convert the ids to 64-bit indices).

    A larger table is one of int32 for uint16 ids; the result then is int32.
    """
    if table is not None and len(table) > _NARROW:
        return torch.from_numpy(np.frombuffer(table, np.int32)[ids])
    found = bytearray(ids) if table is None else bytearray(ids).translate(table)
    return torch.frombuffer(found, dtype=torch.uint8).view(ids.shape)


@dataclass(frozen=True)
class SampleRequest:
    """Specification of one sample: a few hundred bytes, sent to whichever loader worker is free.

    Attributes:
        image, mask: files.
        index: the image's position in the split's file list.
        exemplar: whether the image is from the exemplar memory; None if the step has no exemplars.
        table: relabelling of mask ids, 256 bytes; or as many int32 as there are 16-bit ids.
        crop: side of the square crop in pixels; None for the whole image.
        seed: seed of the augmentation; None for the test transform.
        maps: names and files of grey PNGs that are cropped like the mask; all zeros for an exemplar.
        scaled: whether a JPEG of which a crop is reduced is decoded at a reduced size (`data.decode`).
    """

    image: Path
    mask: Path
    index: int
    exemplar: bool | None
    table: bytes
    crop: int | None
    seed: int | None
    maps: tuple[tuple[str, Path], ...] = ()
    scaled: bool = False

    def read(self, cache: ImageCache | None = None) -> Batch:
        """Load the sample: a :class:`Batch` of one image, without the first dimension.

        Raises:
            UserError: a file cannot be read, or the sizes of image and mask differ.
        """
        if self.crop and self.seed is not None:
            image, mask = self._read_train_crop(self.crop, self.seed, cache)
        else:
            image = self._read_image(cache)
            mask = self._read_masks(image.shape[1:], cache)
            if self.crop:
                image, mask = eval_transform(image, mask, self.crop)
        # Beside int32 labels, maps have their type until here.
        extras = {name: values.to(torch.uint8) for (name, _), values in zip(self.maps, mask[1:], strict=True)}
        if self.exemplar is not None:
            extras[EXEMPLAR] = torch.tensor(self.exemplar)
        return Batch(image, mask[0], torch.tensor(self.index), extras)

    def _read_train_crop(self, side: int, seed: int, cache: ImageCache | None) -> tuple[Tensor, Tensor]:
        """Read a random crop of the image, [3, side, side], and of its masks, [1 + maps, side, side]."""
        image = None
        if not self.scaled or (size := scalable_size(self.image)) is None:
            image = self._read_image(cache)
            size = image.shape[1], image.shape[2]
        mask = self._read_masks(size, cache)
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed the GPUs, whose random state fork_rng does not restore here.
            torch.default_generator.manual_seed(seed)
            crop = draw_crop(size)
        if image is None and (scale := crop.scale(side)) > 1:
            crop = crop.aligned(scale, size)
            image = crop.resize(read_scaled(self.image, crop.box, scale), side)
        else:
            image = crop.apply(self._read_image(cache) if image is None else image, side)
        return image, crop.apply_to_mask(mask, side)

    def _read_image(self, cache: ImageCache | None) -> Tensor:
        return cache.image(self.image) if cache else read_image(self.image)

    def _read_masks(self, size: Sequence[int], cache: ImageCache | None) -> Tensor:
        """Read the mask, relabelled, and the maps of an image of (height, width), [1 + maps, H, W]."""

        def grey(path: Path, table: bytes | None) -> Tensor:
            wide = table is not None and len(table) > _NARROW
            mask = relabel(cache.mask(path, wide) if cache else read_mask(path, wide=wide), table)[None]
            refuse_other_size(size, mask.shape[1:], path)
            return mask

        mask = grey(self.mask, self.table)
        if not self.maps:
            return mask
        return torch.cat([mask, *(torch.zeros_like(mask) if self.exemplar else grey(p, None) for _, p in self.maps)])


class StepDataset:
    """Samples of one step, addressed by (epoch, position); the augmentation depends on the epoch.

    Args:
        split: the files.
        positions: positions in ``split`` of the files to use, as returned by :func:`select_images`.
        table: [256] uint8 relabelling of mask ids, or [65536] int32.
        crop: side of the square crops in pixels; None for whole images (tests only).
        seed: seed of the augmentation, (run seed, step); None for the test transform.
        exemplars: number of exemplars, which are the last files of ``split``.
        exemplar_table: relabelling of exemplars, by default ``table``.
        maps: folders of grey PNGs with the stems of the images, by name in the extras.
        scaled: whether JPEGs whose crops are reduced are decoded at a reduced size.
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
        scaled: bool = False,
    ) -> None:
        self.split, self.positions, self.crop, self.seed, self.maps = split, positions, crop, seed, maps or {}
        self.exemplars, self.first_exemplar, self.scaled = exemplars, len(split) - exemplars, scaled
        # All requests share the same bytes object, so that it is pickled only once per batch.
        self.table = table.tobytes()
        self.exemplar_table = self.table if exemplar_table is None else exemplar_table.tobytes()

    def __len__(self) -> int:
        return len(self.positions)

    def request(self, key: tuple[Epoch, int]) -> SampleRequest:
        """Return the request for the sample at (epoch, position)."""
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
            self.scaled,
        )

    def __getitem__(self, key: tuple[Epoch, int]) -> Batch:
        return self.request(key).read()


class EpochSampler(Sampler[list[tuple[Epoch, int]]]):
    """Sampler of batches of (epoch, position) over several epochs, so that one pass of the loader serves a whole step.

    Args:
        size: number of samples.
        batch_size: samples per batch, over all processes.
        epochs: the epochs to iterate over; a name ("after") denotes an epoch with its own crops.
        seed: seed of the order, (run seed, step); None keeps the natural order.
        drop_last: whether to drop the incomplete last batch of each epoch.
        rank, world: this process takes every ``world``-th sample of each batch, starting with sample ``rank``.
        start: number of batches to skip when resuming.
        exemplars: number of samples that follow the first ``size``; half of every batch is drawn from them, with
            different crops in every batch.
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
        """Number of batches in one epoch."""
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
