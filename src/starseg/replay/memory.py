"""Exemplar memory: which images STAR-M, SSUL-M and DKD-M store.

The selection is SSUL's (docs/reference/star.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


@dataclass(frozen=True)
class MemoryRule:
    """How a method selects and uses old images.

    Attributes:
        score: smallest sigmoid at which a prediction counts as a class of a candidate image.
        mix: "append" the images to those of the step, or let them be "half" of every batch.
        labels: whether their labels show the "new" classes alone, like the step's own images, or all classes "seen" so
            far.
    """

    score: float
    mix: Literal["append", "half"] = "append"
    labels: Literal["new", "seen"] = "new"


class Exemplar(NamedTuple):
    """Image in the exemplar memory, or a candidate for it.

    Attributes:
        name: the data set's own identifier of the image (:attr:`starseg.data.datasets.base.Split.ids`).
        classes: dataset ids of the classes that the image is known to show, ascending.
    """

    name: str
    classes: tuple[int, ...]


def merge(exemplars: Iterable[Exemplar]) -> list[Exemplar]:
    """Return each image once, with all classes that it is known to show."""
    classes: dict[str, set[int]] = {}
    for name, shown in exemplars:
        classes.setdefault(name, set()).update(shown)
    return [Exemplar(name, tuple(sorted(shown))) for name, shown in classes.items()]


def round_robin(candidates: Sequence[Exemplar], classes: Sequence[int], size: int) -> dict[int, list[Exemplar]]:
    """Take the first remaining candidate that shows a class, for each class in turn.

    Stops when ``size`` images are taken or no remaining candidate shows any of the classes.

    Returns:
        The images taken for each class.
    """
    left = list(candidates)
    chosen: dict[int, list[Exemplar]] = {c: [] for c in classes}
    taken = 0
    while taken < size:
        before = taken
        for c in classes:
            place = next((i for i, exemplar in enumerate(left) if c in exemplar.classes), None)
            if place is not None and taken < size:
                chosen[c].append(left.pop(place))
                taken += 1
        if taken == before:
            break
    return chosen


def choose(candidates: Sequence[Exemplar], classes: Sequence[int], size: int, seed: int) -> list[Exemplar]:
    """Choose a memory of at most ``size`` images, balanced over ``classes``, in an order drawn from ``seed``."""
    draw = np.random.default_rng(seed)
    shuffled = [candidates[i] for i in draw.permutation(len(candidates))]
    order = [classes[i] for i in draw.permutation(len(classes))]
    chosen = round_robin(shuffled, order, size)
    return [exemplar for c in classes for exemplar in chosen[c]]
