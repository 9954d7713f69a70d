"""The exemplar memory of a step: chosen when the step begins and listed in its memory.json, with copies on request."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from starseg.data.datasets.base import NO_FILES, Split
from starseg.data.samples import Batch
from starseg.engine.run_data import RunData
from starseg.errors import UserError
from starseg.models import Segmenter
from starseg.ops.bilinear import resize
from starseg.replay.memory import Exemplar, choose, merge
from starseg.utils.files import read_json, write_json


@dataclass(frozen=True)
class Memory:
    """The exemplar memory of one step.

    Attributes:
        exemplars: the exemplars.
        files: their images and masks, in the same order.
    """

    exemplars: tuple[Exemplar, ...] = ()
    files: Split = NO_FILES

    @property
    def nbytes(self) -> int:
        """Size of the images and masks on disk in bytes."""
        return sum(path.stat().st_size for path in (*self.files.images, *self.files.masks))

    def save(self, folder: Path, previous: Path, step: int, copy: bool) -> None:
        """Write memory.json to a step directory, and copy the files if requested.

        Args:
            folder: the step directory.
            previous: directory of the previous step, whose entries are kept.
            step: number of the step.
            copy: whether to copy the images and masks into ``folder``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if copy:
            for name, *sources in zip(self.files.ids, self.files.images, self.files.masks, strict=True):
                for source, target in zip(sources, _copies(folder, name), strict=True):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
        candidates = [[name, list(classes)] for name, classes in self.exemplars]
        entry = {"memory_candidates": candidates, "memory_list": sorted(self.files.ids)}
        write_json(folder / "memory.json", {**read_memory(previous), f"step_{step}": entry})


def read_memory(folder: Path) -> dict[str, Any]:
    """Read memory.json of a step directory, in the published format; empty if the step has no exemplars.

    It contains, for each step so far, ``memory_candidates`` (the exemplars with the dataset ids that they show) and
    ``memory_list`` (their names).
    """
    path = folder / "memory.json"
    return read_json(path) if path.is_file() else {}


def kept(folder: Path, step: int) -> list[Exemplar]:
    """Return the exemplars that a step kept, according to memory.json in ``folder``.

    Raises:
        UserError: memory.json is damaged.
    """
    try:
        entries = read_memory(folder).get(f"step_{step}", {}).get("memory_candidates", [])
        return TypeAdapter(list[Exemplar]).validate_python(entries)
    except (AttributeError, ValidationError) as error:
        raise UserError(f"{folder / 'memory.json'}: damaged, expected [image, [class ids]] in each step") from error


def _copies(folder: Path, name: str) -> tuple[Path, Path]:
    """Return where the copies of an image and its mask are, by the name of the image.

    A name in the published lists and a plain word give its stem; others, of which several can have the same stem, get a
    digest.
    """
    if name.startswith("/JPEGImages/") or re.fullmatch(r"[\w-]+", name):
        stem = Path(name.split()[0]).stem
    else:
        stem = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    return folder / "memory" / "images" / f"{stem}.jpg", folder / "memory" / "masks" / f"{stem}.png"


def locate(names: Iterable[str], split: Split, previous: Path) -> Split:
    """Find the files of images by name, in the data set or among the copies in the previous step's directory.

    Raises:
        UserError: an image is in neither.
    """
    places = dict(zip(split.ids, zip(split.images, split.masks, strict=True), strict=True))
    files = []
    for name in names:
        image, mask = places.get(name) or _copies(previous, name)
        if not image.is_file() or not mask.is_file():
            raise UserError(
                f"{previous / 'memory.json'}: its image {name!r} is neither in the data set nor among the copies in "
                f"{previous / 'memory'}; give the data set that it was chosen from"
            )
        files.append((image, mask, name))
    images, masks, ids = zip(*files, strict=True) if files else ((), (), ())
    return Split(images, masks, ids)


def choose_memory(
    data: RunData, step: int, size: int, previous: Path, seed: int, found: Callable[[int], Tensor]
) -> Memory:
    """Choose the exemplar memory of a step (docs/reference/star.md, "Exemplar memory").

    The candidates are the exemplars and the training images of the previous step.

    Args:
        data: data of the run.
        step: number of the step, at least 1.
        size: maximum number of images.
        previous: directory of the previous step.
        seed: seed of the random choice.
        found: function that returns, given the number of a step, the confident predictions in its training images as
            pixel counts [N, 1 + C] by position among them and training id; called from step 2 on.
    """
    split, positions = data.dataset.train, data.positions(step - 1, "train")
    new = list(data.task.new(step - 1))
    classes = [set(np.compress(row > 0, new).tolist()) for row in data.train_pixels[positions][:, new]]
    if step > 1:
        ids = data.task.dataset_ids(step - 1)
        for shown, row in zip(classes, found(step - 1).cpu(), strict=True):
            shown.update(ids[k] for k in row.nonzero()[:, 0].tolist() if k)
    candidates = kept(previous, step - 1)
    candidates += [Exemplar(split.ids[p], tuple(shown)) for p, shown in zip(positions, classes, strict=True)]
    chosen = choose(merge(candidates), data.task.old(step), size, seed)
    return Memory(tuple(chosen), locate((e.name for e in chosen), split, previous))


def confident_classes(
    model: Segmenter, batches: Iterable[Batch], positions: np.ndarray, fill_in: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Count the pixels of each class in each image, in labels completed by confident predictions.

    Args:
        model: network of the previous step.
        batches: the images.
        positions: positions of the images in the training split, ascending.
        fill_in: function that fills the confident predictions of logits [N, C, H, W] into labels [N, H, W].

    Returns:
        [len(positions), 1 + C] int64 pixel counts by training id.
    """
    ids = 1 + model.classes
    total = torch.zeros(len(positions), ids, dtype=torch.int64, device=model.mean.device)
    for batch in batches:
        logits = resize(model(batch.images).logits.float(), batch.labels.shape[-2:])
        filled = fill_in(batch.labels, logits)
        rows = np.searchsorted(positions, batch.indices.numpy())
        for row, labels in zip(rows, filled, strict=True):
            total[row] += torch.bincount(labels[labels < ids].flatten(), minlength=ids)
    return total
