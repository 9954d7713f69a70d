"""Exemplar memory: which images STAR-M, SSUL-M and DKD-M keep (docs/reference/star.md; the selection is SSUL's)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np


@dataclass(frozen=True)
class MemoryRule:
    """Rule by which a method selects and uses exemplars.

    Attributes:
        score: sigmoid from which on a prediction names a class of an image that may be kept.
        mix: "append" the images to the step's, or let them be "half" of every batch.
        labels: they show the "new" classes alone, like the step's own images, or all classes "seen" so far.
    """

    score: float
    mix: Literal["append", "half"] = "append"
    labels: Literal["new", "seen"] = "new"


class Exemplar(NamedTuple):
    """Image that is kept as an exemplar, or a candidate.

    Attributes:
        name: the data set's own identifier of it (:attr:`starseg.data.datasets.base.Split.ids`).
        classes: dataset ids of the classes it is known to show, ascending.
    """

    name: str
    classes: tuple[int, ...]


def merge(exemplars: Iterable[Exemplar]) -> list[Exemplar]:
    """Merge entries of the same image, with all classes that it is known to show."""
    classes: dict[str, set[int]] = {}
    for name, shown in exemplars:
        classes.setdefault(name, set()).update(shown)
    return [Exemplar(name, tuple(sorted(shown))) for name, shown in classes.items()]


def round_robin(candidates: Sequence[Exemplar], classes: Sequence[int], size: int) -> dict[int, list[Exemplar]]:
    """Take for each class in turn the first candidate left that shows it, until ``size`` are taken or none is left.

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
