"""A validation split, cut from the training images of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from starseg.config import DataConfig
from starseg.data.datasets import Dataset, Split, open_dataset
from starseg.data.index import class_index
from starseg.errors import UserError
from starseg.tasks import IGNORE


def open_splits(config: DataConfig) -> Dataset:
    """Open the configured data set; with `data.validation`, held-out training images take the place of its test images.

    Raises:
        UserError: see :func:`starseg.data.datasets.open_dataset`; or there are too few training images to hold any out.
    """
    dataset = open_dataset(config)
    if config.validation is None:
        return dataset
    held = held_out(class_index(dataset, dataset.train), dataset.train.ids, config.validation)
    if not held.any():
        raise UserError(
            f"data.validation: no class is shown by two of the {len(held)} training images of {dataset.root}, so none "
            "can be held out; add images, or remove the key"
        )
    train, test = _take(dataset.train, ~held), _take(dataset.train, held)
    return replace(dataset, train=train, test=test, published={})


def held_out(pixels: np.ndarray, ids: Sequence[str], share: float) -> np.ndarray:
    """Choose validation images by a hash of their identifiers, so that they depend on nothing else.

    A class that two images or more show is then represented on both sides, and a class of a single image in training;
    where two classes contradict each other, the rarer one decides.

    Args:
        pixels: [N, 256] class index of the training images.
        ids: identifiers of the images.
        share: share of the images to hold out.

    Returns:
        [N] bool.
    """
    order = np.argsort([hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest() for name in ids])
    held = np.zeros(len(ids), bool)
    held[order[: round(share * len(ids))]] = True
    present = np.delete(pixels > 0, IGNORE, axis=1)
    for number in np.argsort(-present.sum(0), kind="stable"):
        shown = order[present[order, number]]
        if held[shown].all():
            held[shown[-1:]] = False
        elif len(shown) > 1 and not held[shown].any():
            held[shown[0]] = True
    return held


def _take(split: Split, keep: np.ndarray) -> Split:
    chosen = np.flatnonzero(keep)
    images, masks = (tuple(files[i] for i in chosen) for files in (split.images, split.masks))
    return Split(images, masks, tuple(split.ids[i] for i in chosen))
