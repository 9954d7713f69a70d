"""What starseg knows about a data set, and the registry in which every data set is declared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starseg.data.datasets.base import Dataset, Split
from starseg.data.labels import LabelMap
from starseg.errors import UserError
from starseg.tasks import BACKGROUND, IGNORE, SETTINGS, Setting, Steps, TaskSequence, make_task


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set: everything that code outside its module must know about it.

    Attributes:
        key: its name in configurations (`data.dataset`).
        title: its name in messages.
        root: its folder where `data.root` is not given.
        open: reads the folder's layout; returns what :meth:`dataset` makes of it, or raises a UserError that describes
            the layout.
        names: class names by class id, the background first; numbers, or nothing, where ``open`` reads the names.
        background: whether class id 0 is a background; sets without one are not supported yet.
        label_map: class ids by id on disk; None where they are the same.
        ignored: ids on disk whose pixels are ignored, besides 255.
        test_fill: what classes not learnt yet become in test labels: 0 (background) or 255 (ignored).
        tasks: published tasks, class ids of each step by name.
        settings: the settings in which tasks can be run.
        images: published number of images by split ("training", "test").
        sources: where to get it, as lines of text.
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
    settings: tuple[Setting, ...] = SETTINGS
    images: Mapping[str, int] = field(default_factory=dict)
    sources: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.background:
            raise ValueError(f"data set {self.key!r}: data sets without a background class are not supported yet")
        if self.test_fill not in (BACKGROUND, IGNORE):
            raise ValueError(f"data set {self.key!r}: test_fill must be {BACKGROUND} or {IGNORE}, got {self.test_fill}")
        mapped = self.label_map or {}
        on_disk, class_ids = {*mapped, *self.ignored}, set(mapped.values())
        if wrong := sorted(i for i in on_disk if i not in range(256)):
            raise ValueError(f"data set {self.key!r}: ids on disk must be 0 to 255, got {wrong}")
        if twice := sorted(mapped.keys() & {IGNORE, *self.ignored}):
            raise ValueError(f"data set {self.key!r}: label_map gives classes to the ignored ids {twice}")
        known = range(len(self.names) or IGNORE)
        if wrong := sorted(class_ids - set(known)):
            raise ValueError(f"data set {self.key!r}: label_map gives class ids {wrong}, names has 0 to {known[-1]}")

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
        """Return the data set in a folder, as ``open`` does.

        Args:
            root: the folder.
            train: training files.
            test: files of the split on which results are reported.
            names: class names found in the folder; by default the spec's.
            published: whether these are the published classes, so that the published numbers of images apply.
            unlabelled: class ids that masks leave to the background wherever they are.
        """
        names = tuple(self.names if names is None else names)
        return Dataset(
            self.key,
            root,
            names,
            train,
            test,
            self.test_fill,
            LabelMap.make(len(names), self.label_map, self.ignored),
            frozenset(unlabelled),
            self.images if published else {},
        )

    def task(
        self,
        names: Sequence[str],
        name: str | None = None,
        steps: Sequence[Sequence[int | str]] | None = None,
        setting: Setting = "overlap",
    ) -> TaskSequence:
        """Return a task on this data set: a published one, or a free list of steps.

        Args:
            names: class names by class id, as the opened data set has them.
            name: a published task, "joint", or a free label beside ``steps``.
            steps: class ids or names of each step.
            setting: one of ``settings``.

        Raises:
            UserError: another setting, an unknown task or class, a class listed twice, an empty step.
        """
        if setting not in self.settings:
            raise UserError(
                f"task.setting: {self.title} has no setting {setting!r}; give one of: {', '.join(self.settings)}"
            )
        return make_task(self.tasks, names, name, steps, setting)


DATASETS: dict[str, DatasetSpec] = {}
"""Registered data sets by key; :func:`starseg.data.datasets.find_dataset` also loads those of other packages."""


def register_dataset(spec: DatasetSpec) -> DatasetSpec:
    """Make a data set known under its key, in configurations and on the command line.

    Returns:
        The spec.

    Raises:
        ValueError: the key is taken.
    """
    if spec.key in DATASETS:
        raise ValueError(f"data set {spec.key!r} is registered already: {DATASETS[spec.key].title}")
    DATASETS[spec.key] = spec
    return spec
