"""Old classes that new masks do not label: where the old model sees one, a background label says nothing about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from starseg.data.annotations.photos import save_mask
from starseg.data.datasets.folder import open_folder, write_list
from starseg.data.images import read_mask
from starseg.finetuning.prepare import PreparedStep, SourceStep
from starseg.inference.predictor import load
from starseg.tasks import BACKGROUND
from starseg.utils.progress import track

SEEN = "seen"
"""Folder of the validation masks with the old classes that the old model sees, beside `masks`."""


def unlabelled_classes(source: SourceStep | None, prepared_step: PreparedStep) -> list[int]:
    """Return the dataset ids of the old classes that the new masks count as background."""
    if source is None or not source.info.background:
        return []
    return [number for number in source.info.dataset_ids[1:] if number not in prepared_step.labelled]


def mark_seen(root: Path, source: SourceStep, hidden: list[int], console: Console) -> None:
    """Write validation masks in which background pixels have the unlabelled old class that the old model sees there.

    The list of validation images then names these masks. Such pixels are no background when a model is scored
    (:meth:`starseg.data.datasets.base.Dataset.scored`). Later calls do nothing.

    Args:
        root: the prepared data in the run directory.
        source: the step of the old model.
        hidden: dataset ids of the unlabelled classes.
        console: where the progress bar is shown.
    """
    split, info = open_folder(root).test, source.info
    if not hidden or not len(split) or all(SEEN in path.relative_to(root).parts[:1] for path in split.masks):
        return
    table = np.full(256, BACKGROUND, np.uint8)
    for number, value in zip(info.dataset_ids, info.predicted_ids, strict=True):
        if number in hidden:
            table[value] = number
    predictor, pairs = load(source.folder), []
    found = predictor.stream(split.images)
    for done in track(console, "old classes in the validation images", found, len(split)):
        if done.error:
            raise done.error
        mask = split.masks[done.index]
        ids, seen = read_mask(mask), table[done.mask]
        place = Path(SEEN) / mask.relative_to(root / "masks")
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        save_mask(root / place, np.where(ids == BACKGROUND, seen, ids))
        pairs.append((done.index, (split.images[done.index], place)))
    write_list(root / "val.txt", (pair for _, pair in sorted(pairs)))
