"""Validation splits, cut from training images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from starseg.config import DataConfig
from starseg.data.datasets import Dataset, open_dataset
from starseg.data.index import class_index
from starseg.data.samples import sample_seed
from starseg.data.selection import shown_classes
from starseg.errors import UserError


def open_splits(config: DataConfig) -> Dataset:
    """Open the configured data set; with `data.validation`, held-out training images take the place of its test images.

    Raises:
        UserError: see :func:`starseg.data.datasets.open_dataset`; or there are too few training images to hold any out.
    """
    dataset = open_dataset(config)
    if config.validation is None:
        return dataset
    shown = shown_classes(class_index(dataset, dataset.train))
    held = split_images(shown, config.validation, np.random.default_rng(sample_seed("validation")))
    if not held.any():
        raise UserError(
            f"data.validation: none of the {len(held)} training images of {dataset.root} can be held out, because a "
            "class would lose its only one; add images, or remove the key"
        )
    train, test = (dataset.train.take(np.flatnonzero(chosen)) for chosen in (~held, held))
    return replace(dataset, train=train, test=test, published={})


def split_images(shown: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose validation images, a fraction of those of each class, leaving every class an image to train on.

    Args:
        shown: [N, C] bool, whether an image shows a class.
        share: fraction of the images to choose.
        rng: random generator.

    Returns:
        [N] bool, whether an image is chosen; a class shown by two or more images is in both parts wherever possible.
    """
    chosen = np.zeros(len(shown), bool)
    left = shown.sum(0)
    for column in np.argsort(left, kind="stable"):
        images = rng.permutation(np.flatnonzero(shown[:, column]))
        wanted = min(max(1, round(share * len(images))), len(images) - 1)
        for image in images:
            spared = (left[shown[image]] > 1).all()
            if not chosen[image] and spared and chosen[images].sum() < wanted:
                chosen[image] = True
                left = left - shown[image]
    without = rng.permutation(np.flatnonzero(~shown.any(1)))
    chosen[without[: round(share * len(without))]] = True
    return chosen
