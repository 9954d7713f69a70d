"""Data set specs, and the registry of data sets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starseg.data.datasets.base import Dataset, Split
from starseg.data.labels import LabelMap
from starseg.errors import UserError
from starseg.tasks import (
    BACKGROUND,
    CLASS_SETTINGS,
    IGNORE,
    WIDE_IGNORE,
    DomainSteps,
    Setting,
    Steps,
    TaskSequence,
    make_domain_task,
    make_task,
)


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """Description of a data set: everything that code outside its module needs to know about it.

    Attributes:
        key: name of the data set in configurations (`data.dataset`).
        title: name of the data set in messages.
        root: default of `data.root`.
        open: function that reads the layout of a folder and returns the result of :meth:`dataset`, or raises a
            UserError that describes the expected layout.
        names: class names by class id, the background first; numbers or empty if ``open`` reads the names. Without a
            background, the first name is that of class id 1.
        background: whether class id 0 is a background class. If not, all pixels are of a class or ignored, class ids
            begin at 1, and predictions are always a class.
        label_map: class ids by id on disk; None if they are the same, or without a background, one more.
        ignored: ids on disk whose pixels are ignored, in addition to 255 (65535 with more than 254 classes, whose masks
            have 16 bits).
        test_fill: label of classes not learnt yet in test labels: 0 (background) or 255 (ignored).
        tasks: published tasks by name, each with the class ids of its steps.
        later_tasks: tasks of other papers, in the same form; they have no configuration files of their own.
        aliases: further names of published tasks, each with the name in ``tasks``.
        settings: the settings in which tasks can be run.
        domain_tasks: published tasks in the setting "domain", each with the domains of its steps.
        recipe: key of the data set whose recipes apply to methods without a published recipe for this one; None if
            the configuration must give the hyper-parameters.
        images: published number of images by split ("training", "test").
        sources: where to download the data set, as lines of text.
    """

    key: str
    title: str
    root: Path
    open: Callable[[Path], Dataset]
    names: tuple[str, ...] = ()
    background: bool = True
    label_map: Mapping[int, int] | None = None
    ignored: Collection[int] = ()
    test_fill: int = BACKGROUND
    tasks: Mapping[str, Steps] = field(default_factory=dict)
    later_tasks: Mapping[str, Steps] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[Setting, ...] = CLASS_SETTINGS
    domain_tasks: Mapping[str, DomainSteps] = field(default_factory=dict)
    recipe: str | None = None
    images: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.test_fill not in (BACKGROUND, IGNORE):
            raise ValueError(f"data set {self.key!r}: test_fill must be {BACKGROUND} or {IGNORE}, got {self.test_fill}")
        if not self.background and self.test_fill != IGNORE:
            raise ValueError(f"data set {self.key!r}: without a background, test_fill must be {IGNORE} (ignored)")
        if unknown := sorted(set(self.aliases.values()) - {"joint", *self.all_tasks, *self.domain_tasks}):
            raise ValueError(f"data set {self.key!r}: aliases name tasks that it does not have: {', '.join(unknown)}")
        mapped = self.label_map or {}
        on_disk, class_ids = {*mapped, *self.ignored}, set(mapped.values())
        highest = WIDE_IGNORE if len(self.class_names()) > IGNORE else IGNORE
        if wrong := sorted(i for i in on_disk if i not in range(highest + 1)):
            raise ValueError(f"data set {self.key!r}: ids on disk must be 0 to {highest}, got {wrong}")
        if twice := sorted(mapped.keys() & {highest, *self.ignored}):
            raise ValueError(f"data set {self.key!r}: label_map gives classes to the ignored ids {twice}")
        first = BACKGROUND if self.background else 1
        known = range(first, first + len(self.names) if self.names else IGNORE)
        if wrong := sorted(class_ids - set(known)):
            raise ValueError(
                f"data set {self.key!r}: label_map gives class ids {wrong}, names has {first} to {known[-1]}"
            )

    @property
    def all_tasks(self) -> dict[str, Steps]:
        """Steps of every named task."""
        return {**self.tasks, **self.later_tasks}

    def class_names(self) -> tuple[str, ...]:
        """Return the class names by class id, with "background" for id 0 if there is no background."""
        return self.names if self.background else ("background", *self.names)

    def dataset(
        self,
        root: Path,
        train: Split,
        test: Split,
        names: Sequence[str] | None = None,
        *,
        published: bool = True,
        unlabelled: Collection[int] = (),
    ) -> Dataset:
        """Create the data set that ``open`` returns.

        Args:
            root: the folder.
            train: training files.
            test: files of the split on which results are reported.
            names: class names read from the folder; by default those of the spec.
            published: whether the classes are the published ones, so that the published numbers of images apply.
            unlabelled: ids of classes that the masks always label as background.
        """
        names, label_map = tuple(self.names if names is None else names), self.label_map
        mask_ids = {}
        if not self.background:
            names = ("background", *names)
            if label_map is None:
                label_map = {i: i + 1 for i in range(len(names) - 1) if i not in self.ignored}
            ignored = WIDE_IGNORE if len(names) > IGNORE else IGNORE
            mask_ids = {BACKGROUND: ignored} | {label_map[value]: value for value in sorted(label_map, reverse=True)}
        return Dataset(
            self.key,
            root,
            names,
            train,
            test,
            self.test_fill,
            LabelMap.make(len(names), label_map, self.ignored),
            frozenset(unlabelled),
            self.images if published else {},
            self.background,
            mask_ids,
        )

    def task(
        self,
        names: Sequence[str],
        name: str | None = None,
        steps: Sequence[Sequence[int | str]] | None = None,
        setting: Setting = "overlap",
    ) -> TaskSequence:
        """Create a task on this data set: a published one, or one with the given steps.

        Args:
            names: class names by class id, as in the opened data set.
            name: name or alias of a published task, "joint", or, with ``steps``, any label.
            steps: class ids or names of each step; in the setting "domain", its domains.
            setting: one of ``settings``.

        Raises:
            UserError: the setting is not supported, the task or a class is unknown, a class is listed twice, or a step
                is empty.
        """
        if setting not in self.settings:
            raise UserError(
                f"task.setting: {self.title} has no setting {setting!r}; give one of: {', '.join(self.settings)}"
            )
        if steps is None and name is not None:
            name = self.aliases.get(name, name)
        if setting == "domain":
            return make_domain_task(self.domain_tasks, names, name, steps)
        return make_task(self.all_tasks, names, name, steps, setting)


DATASETS: dict[str, DatasetSpec] = {}
"""Registered data sets by key; :func:`starseg.data.datasets.find_dataset` loads those of other packages first."""


def register_dataset(spec: DatasetSpec) -> DatasetSpec:
    """Register a data set under its key, for use in configurations and on the command line.

    Returns:
        The spec.

    Raises:
        ValueError: the key is already registered.
    """
    if spec.key in DATASETS:
        raise ValueError(f"data set {spec.key!r} is registered already: {DATASETS[spec.key].title}")
    DATASETS[spec.key] = spec
    return spec
