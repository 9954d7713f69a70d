"""Task sequences: the classes learnt in each step, and the two kinds of class ids.

*Dataset ids* are the values found in mask files (0 background, 255 ignore). *Training ids* number the classes 1..K in
the order of learning, so that everything inside starseg is independent of the class order. This module is the only
place that translates between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from starseg.errors import UserError

Setting = Literal["overlap", "disjoint"]
BACKGROUND, IGNORE = 0, 255

_TABLES: dict[str, tuple[int, tuple[str, ...]]] = {
    "voc": (20, ("19-1", "15-5", "15-1", "10-1", "10-5", "10-10", "5-3")),
    "ade": (150, ("100-50", "100-10", "100-5", "50-50")),
}
# Permuted class orders of VOC 15-1, as used by the published experiments on class order.
_VOC_15_1_ORDERS = {
    "b": (12, 9, 20, 7, 15, 8, 14, 16, 5, 19, 4, 1, 13, 2, 11, 17, 3, 6, 18, 10),
    "c": (13, 19, 15, 17, 9, 8, 5, 20, 4, 3, 10, 11, 18, 16, 7, 12, 14, 6, 1, 2),
    "d": (15, 3, 2, 12, 14, 18, 20, 16, 11, 1, 19, 8, 10, 7, 17, 6, 5, 13, 9, 4),
    "e": (7, 5, 3, 9, 13, 12, 14, 19, 10, 2, 1, 4, 16, 8, 17, 15, 18, 6, 11, 20),
    "f": (7, 13, 5, 11, 9, 2, 15, 12, 14, 3, 20, 1, 16, 4, 18, 8, 6, 10, 19, 17),
    "g": (7, 5, 9, 1, 15, 18, 14, 3, 20, 10, 4, 19, 11, 17, 16, 12, 8, 6, 2, 13),
    "h": (12, 9, 19, 6, 4, 10, 5, 18, 14, 15, 16, 3, 8, 7, 11, 13, 2, 20, 17, 1),
    "i": (13, 10, 15, 8, 7, 19, 4, 3, 16, 12, 14, 11, 5, 20, 6, 2, 18, 9, 17, 1),
    "j": (1, 14, 9, 5, 2, 15, 8, 20, 6, 16, 18, 7, 11, 10, 19, 3, 4, 17, 12, 13),
    "k": (16, 13, 1, 11, 12, 18, 6, 14, 5, 3, 7, 9, 20, 19, 15, 4, 2, 10, 8, 17),
    "l": (10, 7, 6, 19, 16, 8, 17, 1, 14, 4, 9, 3, 15, 11, 12, 2, 18, 20, 13, 5),
    "m": (18, 4, 14, 17, 12, 10, 7, 3, 9, 1, 8, 15, 6, 13, 2, 5, 11, 20, 16, 19),
    "n": (5, 4, 13, 18, 14, 10, 19, 15, 7, 9, 3, 2, 8, 16, 20, 1, 12, 11, 6, 17),
    "o": (9, 12, 13, 18, 7, 1, 15, 17, 10, 8, 4, 5, 20, 16, 6, 14, 19, 11, 2, 3),
    "p": (9, 12, 13, 18, 2, 11, 15, 17, 10, 8, 4, 5, 20, 16, 6, 14, 19, 1, 7, 3),
    "q": (3, 14, 13, 18, 2, 11, 15, 17, 10, 8, 4, 5, 20, 16, 6, 12, 19, 1, 7, 9),
    "r": (3, 14, 13, 1, 2, 11, 15, 17, 7, 8, 4, 5, 9, 16, 19, 12, 6, 18, 10, 20),
    "s": (3, 14, 6, 1, 2, 11, 12, 17, 7, 20, 4, 5, 9, 16, 19, 15, 13, 18, 10, 8),
    "t": (3, 15, 13, 1, 2, 11, 18, 17, 7, 20, 8, 5, 9, 16, 19, 14, 6, 12, 10, 4),
    "u": (3, 15, 13, 14, 6, 11, 18, 17, 7, 20, 8, 4, 9, 16, 10, 1, 2, 12, 19, 5),
    "v": (1, 2, 12, 14, 6, 19, 18, 17, 5, 20, 8, 4, 9, 16, 10, 3, 15, 13, 11, 7),
    "w": (1, 2, 12, 14, 13, 19, 18, 7, 11, 20, 8, 4, 9, 16, 10, 3, 15, 6, 5, 17),
}


def _split(order: Sequence[int], base: int, per_step: int) -> tuple[tuple[int, ...], ...]:
    rest = range(base, len(order), per_step)
    return (tuple(order[:base]), *(tuple(order[i : i + per_step]) for i in rest))


def published_tasks(dataset: str) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The published task tables of a data set: task name -> dataset ids of each step.

    Args:
        dataset: "voc" or "ade"; any other data set has no published tasks.
    """
    if dataset not in _TABLES:
        return {}
    classes, names = _TABLES[dataset]
    order = tuple(range(1, classes + 1))
    tables = {"joint": (order,)} | {n: _split(order, *map(int, n.split("-"))) for n in names}
    if dataset == "voc":
        tables |= {f"15-1_{k}": _split(o, 15, 1) for k, o in _VOC_15_1_ORDERS.items()}
        tables["1-1"] = ((1,), (2,), (3,), (4,), (5,), (6, 7, 8, 9, 10))
    return tables


@dataclass(frozen=True)
class TaskSequence:
    """Class groups in order of learning.

    Attributes:
        name: for people, and for the run's results.
        steps: dataset ids learnt in each step.
        names: class names by dataset id; ``names[0]`` is the background.
        setting: "overlap" or "disjoint" (which training images a step may see).
        base: how many classes, in order of learning, tables call "old"; by default those of step 0.
    """

    name: str
    steps: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]
    setting: Setting = "overlap"
    base: int = 0

    def __post_init__(self) -> None:
        order = self.order
        if not self.steps or any(not s for s in self.steps):
            raise UserError(f"task {self.name!r}: every step needs at least one class, got {self.steps}")
        if twice := sorted({c for c in order if order.count(c) > 1}):
            raise UserError(f"task {self.name!r}: classes listed twice: {[self.label(c) for c in twice]}")
        if unknown := [c for c in order if not 1 <= c < len(self.names) or c == IGNORE]:
            raise UserError(
                f"task {self.name!r}: unknown class ids {unknown}; this data set has 1..{len(self.names) - 1}"
            )

        if not self.base:
            object.__setattr__(self, "base", len(self.steps[0]))

    @property
    def order(self) -> tuple[int, ...]:
        """Dataset ids in order of learning: ``order[k - 1]`` is the dataset id of training id k."""
        return tuple(c for step in self.steps for c in step)

    def __len__(self) -> int:
        return len(self.steps)

    def label(self, dataset_id: int) -> str:
        """The class's name, or its number where it has none."""
        return self.names[dataset_id] if 0 <= dataset_id < len(self.names) else str(dataset_id)

    def list_names(self, dataset_ids: Sequence[int], limit: int = 12) -> str:
        """Class names for a message; the middle of a long list is left out."""
        names = [self.label(c) for c in dataset_ids]
        if len(names) > limit:
            names = [*names[: limit - 2], f"... ({len(names)} classes)", names[-1]]
        return ", ".join(names)

    def new(self, step: int) -> tuple[int, ...]:
        """Dataset ids learnt in ``step``."""
        return self.steps[step]

    def old(self, step: int) -> tuple[int, ...]:
        """Dataset ids learnt before ``step``, in order of learning."""
        return tuple(c for group in self.steps[:step] for c in group)

    def seen(self, step: int) -> tuple[int, ...]:
        """Dataset ids learnt up to and including ``step``, in order of learning."""
        return self.old(step) + self.new(step)

    def class_names(self, step: int) -> tuple[str, ...]:
        """Names by training id after ``step``, the background first."""
        return tuple(self.label(c) for c in (BACKGROUND, *self.seen(step)))

    def dataset_ids(self, step: int) -> tuple[int, ...]:
        """Dataset ids by training id after ``step``: undoes :meth:`relabelling`."""
        return (BACKGROUND, *self.seen(step))

    def relabelling(self, step: int, split: Literal["train", "val", "test"], fill: int = BACKGROUND) -> np.ndarray:
        """Table from dataset ids to training ids.

        Training and validation labels show the step's new classes only, test labels every class seen so far.

        Args:
            step: the step.
            split: "train", "val" or "test".
            fill: what every other id becomes: 0 in training, in tests 0 (VOC) or 255 (ADE20K).

        Returns:
            [256] uint8; 0 stays 0 and 255 stays 255.
        """
        table = np.full(256, fill, np.uint8)
        table[BACKGROUND], table[IGNORE] = BACKGROUND, IGNORE
        shown = self.seen(step) if split == "test" else self.new(step)
        first = 1 if split == "test" else 1 + len(self.old(step))
        table[list(shown)] = np.arange(first, first + len(shown))
        return table


def _resolve(classes: Iterable[int | str], names: Sequence[str], task: str) -> tuple[int, ...]:
    ids = []
    for c in classes:
        if isinstance(c, str) and c not in names[1:]:
            raise UserError(f"task {task!r}: unknown class {c!r}; this data set has: {', '.join(names[1:])}")
        ids.append(names.index(c) if isinstance(c, str) else c)
    return tuple(ids)


def make_task(
    dataset: str,
    names: Sequence[str],
    name: str | None = None,
    steps: Sequence[Sequence[int | str]] | None = None,
    setting: Setting = "overlap",
) -> TaskSequence:
    """Build a task from a published name or from a free list of steps.

    Args:
        dataset: whose published tables ``name`` is looked up in ("voc", "ade", ...).
        names: class names by dataset id, the background first.
        name: a published task such as "15-1"; with ``steps`` a free label; "joint" works for every data set.
        steps: dataset ids or class names of each step.
        setting: "overlap" or "disjoint".

    Raises:
        UserError: unknown task or class, a class listed twice, an empty step.
    """
    if steps is not None:
        label = name or "custom"
        return TaskSequence(label, tuple(_resolve(s, names, label) for s in steps), tuple(names), setting)
    tables = {"joint": (tuple(range(1, len(names))),)} | published_tasks(dataset)
    if name not in tables:
        raise UserError(
            f"task.name: unknown task {name!r} for data set {dataset!r}; known: {', '.join(sorted(tables))}. "
            "Or give task.steps, a list of lists of class names or ids."
        )
    return TaskSequence(name, tables[name], tuple(names), setting)
