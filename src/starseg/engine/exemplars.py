"""Exemplar memory of a step: chosen when the step begins, saved as memory.json, copied if requested."""

from __future__ import annotations

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
    """Exemplars of one step, and their files in the same order."""

    exemplars: tuple[Exemplar, ...] = ()
    files: Split = NO_FILES

    @property
    def nbytes(self) -> int:
        """Bytes of the images and masks on disk."""
        return sum(path.stat().st_size for path in (*self.files.images, *self.files.masks))

    def save(self, folder: Path, previous: Path, step: int, copy: bool) -> None:
        """Write memory.json into a step directory, and copies of the files if requested."""
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
    """Read memory.json of a step directory, in the published form; empty if the step keeps no images.

    It holds, for each step so far, ``memory_candidates`` (the kept images with their dataset ids) and ``memory_list``
    (their names).
    """
    path = folder / "memory.json"
    return read_json(path) if path.is_file() else {}


def kept(folder: Path, step: int) -> list[Exemplar]:
    """Return the exemplars of a step.

    Raises:
        UserError: memory.json is damaged.
    """
    try:
        entries = read_memory(folder).get(f"step_{step}", {}).get("memory_candidates", [])
        return TypeAdapter(list[Exemplar]).validate_python(entries)
    except (AttributeError, ValidationError) as error:
        raise UserError(f"{folder / 'memory.json'}: damaged, expected [image, [class ids]] in each step") from error


def _copies(folder: Path, name: str) -> tuple[Path, Path]:
    stem = Path((name.split() or [""])[0]).stem
    return folder / "memory" / "images" / f"{stem}.jpg", folder / "memory" / "masks" / f"{stem}.png"


def locate(names: Iterable[str], split: Split, previous: Path) -> Split:
    """Locate the files of images: those of the data set, or the copies that the previous step kept.

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
    """Choose the memory of ``step`` from what step - 1 kept and trained on (docs/reference/star.md, "Exemplar memory").

    Args:
        data: of the run.
        step: at least 1.
        size: how many images at most.
        previous: directory of step - 1.
        seed: of the draw.
        found: asked from step 2 on for the confident predictions in the images of step - 1: [N, 1 + C] pixels by
            position among them and training id.
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
    """Count the pixels of each class in each image, [len(positions), 1 + C].

    Args:
        model: the previous step's.
        batches: the images.
        positions: their positions in the training split, ascending.
        fill_in: labels [N, H, W] with the confident predictions in logits [N, C, H, W] filled in.
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
