"""Task sequences: the classes learnt in each step, and the two kinds of class ids.

*Dataset ids* are the class ids of a data set's spec (0 background, 255 ignore), to which its label map translates the
values in mask files where they differ. *Training ids* number the classes 1..K in the order of learning, so that
everything inside starseg is independent of the class order. This module is the only place that translates between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from starseg.errors import UserError

Setting = Literal["overlap", "disjoint", "domain"]
"""Which training images a step may see: those of its new classes, or in "domain" those of its new domains."""
CLASS_SETTINGS: tuple[Setting, ...] = ("overlap", "disjoint")
"""The settings in which a step learns new classes."""
Steps = tuple[tuple[int, ...], ...]
"""Dataset ids learnt in each step."""
DomainSteps = tuple[tuple[str, ...], ...]
"""Names of the domains of each step."""
BACKGROUND, IGNORE = 0, 255
WIDE_IGNORE = 65_535
"""What :data:`IGNORE` is in masks and labels of data sets with more than 254 classes, which have 16 bits."""


def split_classes(order: Sequence[int], name: str) -> Steps:
    """Steps of a task named by its sizes: "15-1" learns 15 classes of ``order`` first, then one in each step.

    Args:
        order: dataset ids in order of learning.
        name: "<classes of step 0>-<classes of each later step>".

    Raises:
        ValueError: the name has another form.
    """
    sizes = re.fullmatch(r"(\d+)-([1-9]\d*)", name)
    if sizes is None:
        raise ValueError(f"task {name!r}: expected '<classes of step 0>-<classes of each later step>', such as '15-1'")
    base, later = map(int, sizes.groups())
    rest = range(base, len(order), later)
    return (tuple(order[:base]), *(tuple(order[i : i + later]) for i in rest))


@dataclass(frozen=True)
class TaskSequence:
    """Class groups in order of learning.

    Attributes:
        name: for people, and for the run's results.
        steps: dataset ids learnt in each step.
        names: class names by dataset id; ``names[0]`` is the background.
        setting: which training images a step may see.
        base: how many classes, in order of learning, tables call "old"; by default those of step 0.
        domains: the domains of each step in the setting "domain", in which the only group of classes is learnt in step
            0 and labelled in every step. Empty in other settings.
    """

    name: str
    steps: Steps
    names: tuple[str, ...]
    setting: Setting = "overlap"
    base: int = 0
    domains: DomainSteps = ()

    def __post_init__(self) -> None:
        order = self.order
        self._check_domains()
        if not self.steps or any(not s for s in self.steps):
            raise UserError(f"task {self.name!r}: every step needs at least one class, got {self.steps}")
        if twice := sorted({c for c in order if order.count(c) > 1}):
            raise UserError(f"task {self.name!r}: classes listed twice: {[self.label(c) for c in twice]}")
        if unknown := [c for c in order if not 1 <= c < len(self.names)]:
            raise UserError(
                f"task {self.name!r}: unknown class ids {unknown}; this data set has 1..{len(self.names) - 1}"
            )

        if not self.base:
            object.__setattr__(self, "base", len(self.steps[0]))

    def _check_domains(self) -> None:
        listed = [domain for step in self.domains for domain in step]
        if self.domains and (len(self.steps) != 1 or not all(self.domains)):
            raise UserError(f"task {self.name!r}: every step needs at least one domain, got {self.domains}")
        if twice := sorted({domain for domain in listed if listed.count(domain) > 1}):
            raise UserError(f"task {self.name!r}: domains listed twice: {', '.join(twice)}")

    @property
    def order(self) -> tuple[int, ...]:
        """Dataset ids in order of learning: ``order[k - 1]`` is the dataset id of training id k."""
        return tuple(c for step in self.steps for c in step)

    def __len__(self) -> int:
        return len(self.domains or self.steps)

    def at_once(self) -> TaskSequence:
        """Return the task with all its classes in one step; tables still call the same classes "old"."""
        domains = (self.domains_of(len(self) - 1, seen=True),) if self.domains else ()
        return replace(self, steps=(self.order,), domains=domains)

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
        """Dataset ids that the training labels of ``step`` show: its new classes, or with domains all classes."""
        return self.steps[0 if self.domains else step]

    def added(self, step: int) -> tuple[int, ...]:
        """Dataset ids of the classes that the network does not have before ``step``."""
        return () if self.domains and step else self.new(step)

    def old(self, step: int) -> tuple[int, ...]:
        """Dataset ids learnt before ``step`` and not labelled in it, in order of learning."""
        return () if self.domains else tuple(c for group in self.steps[:step] for c in group)

    def seen(self, step: int) -> tuple[int, ...]:
        """Dataset ids learnt up to and including ``step``, in order of learning."""
        return self.old(step) + self.new(step)

    @property
    def wide(self) -> bool:
        """Whether there are more than 254 classes, so that labels have more than 8 bits."""
        return len(self.names) > IGNORE

    def domains_of(self, step: int, seen: bool = False) -> tuple[str, ...]:
        """Domains of ``step``, or with ``seen`` of all steps up to and including it."""
        return tuple(domain for group in self.domains[0 if seen else step : step + 1] for domain in group)

    def describe(self, step: int) -> str:
        """New classes or domains of ``step`` for a message; the middle of a long list is left out."""
        return ", ".join(self.domains_of(step)) if self.domains else self.list_names(self.new(step))

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
            fill: what every other id becomes: 0 in training, in tests 0 or 255 as the data set says.

        Returns:
            [256] uint8; 0 stays 0 and 255 stays 255. With more than 254 classes [65536] int32, where 65535 is ignored.
        """
        ignored = WIDE_IGNORE if self.wide else IGNORE
        fill = ignored if fill == IGNORE else fill
        table = np.full(ignored + 1, fill, np.int32 if self.wide else np.uint8)
        table[BACKGROUND], table[ignored] = BACKGROUND, ignored
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
    tables: Mapping[str, Steps],
    names: Sequence[str],
    name: str | None = None,
    steps: Sequence[Sequence[int | str]] | None = None,
    setting: Setting = "overlap",
) -> TaskSequence:
    """Build a task from a published name or from a free list of steps.

    Args:
        tables: the data set's published tasks, dataset ids of each step by name.
        names: class names by dataset id, the background first.
        name: one of ``tables``, such as "15-1"; with ``steps`` a free label; "joint" works for every data set.
        steps: dataset ids or class names of each step.
        setting: "overlap" or "disjoint"; :func:`make_domain_task` is for "domain".

    Raises:
        UserError: unknown task or class, a class listed twice, an empty step.
    """
    if steps is not None:
        label = name or "custom"
        return TaskSequence(label, tuple(_resolve(s, names, label) for s in steps), tuple(names), setting)
    tables = {"joint": (tuple(range(1, len(names))),), **tables}
    if name not in tables:
        raise UserError(
            f"task.name: unknown task {name!r}; this data set's are: {', '.join(sorted(tables))}. "
            "Or give task.steps, a list of lists of class names or ids."
        )
    return TaskSequence(name, tables[name], tuple(names), setting)


def make_domain_task(
    tables: Mapping[str, DomainSteps],
    names: Sequence[str],
    name: str | None = None,
    steps: Sequence[Sequence[int | str]] | None = None,
) -> TaskSequence:
    """Build a task in the setting "domain", from a published name or from a free list of the domains of each step.

    Args:
        tables: the data set's published tasks, domains of each step by name.
        names: class names by dataset id, the background first; every class is learnt in step 0.
        name: one of ``tables``; with ``steps`` a free label.
        steps: domains of each step.

    Raises:
        UserError: unknown task, a domain listed twice, an empty step.
    """
    label = name or "custom"
    if steps is None:
        if label not in tables:
            raise UserError(
                f"task.name: unknown task {name!r}; this data set's, in the setting domain, are: "
                f"{', '.join(sorted(tables)) or 'none'}. Or give task.steps, a list of lists of domains."
            )
        steps = tables[label]
    domains = tuple(tuple(map(str, group)) for group in steps)
    return TaskSequence(label, (tuple(range(1, len(names))),), tuple(names), "domain", domains=domains)
