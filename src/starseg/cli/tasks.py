"""The command `starseg tasks`: published tasks of a data set, their steps, classes and numbers of images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from starseg.utils.terminal import make_console

if TYPE_CHECKING:
    import numpy as np

    from starseg.data.datasets import Dataset, DatasetSpec
    from starseg.tasks import DomainSteps, Setting, Steps, TaskSequence


def tasks(
    dataset: Annotated[str, typer.Argument(help="Key of a data set, as data.dataset.", show_default=False)],
    name: Annotated[
        str | None, typer.Argument(help="A task, whose steps and classes are listed.", show_default=False)
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Its folder, to count the images.", show_default=False)
    ] = None,
    setting: Annotated[
        str | None, typer.Option(help="overlap, disjoint or domain; by default the first of the data set.")
    ] = None,
) -> None:
    """List the published tasks of a data set, with --root their numbers of images; with a NAME, the steps of a task."""
    from starseg.data.datasets import find_dataset

    spec, console = find_dataset(dataset), make_console()
    chosen = cast("Setting", setting or spec.settings[0])
    if name is None:
        _print_tasks(spec, root, chosen, console)
    else:
        _print_steps(spec, name, root, chosen, console)


def _sizes(steps: Steps | DomainSteps) -> str:
    """Return the numbers of classes or domains of the steps, such as "15, 5 steps of 1"."""
    runs = [(size, len(list(run))) for size, run in groupby(len(step) for step in steps)]
    return ", ".join(f"{count} steps of {size}" if count > 1 else str(size) for size, count in runs)


def _open(spec: DatasetSpec, folder: Path) -> tuple[Dataset, dict[str, np.ndarray]]:
    """Open a data set and index both splits.

    Raises:
        UserError: the folder has another layout, or a file is missing or unreadable.
    """
    from starseg.data.datasets import refuse_missing
    from starseg.data.index import class_index

    dataset = spec.open(folder)
    refuse_missing(dataset)
    return dataset, {split: class_index(dataset, files) for split, files in dataset.splits.items()}


def _counts(dataset: Dataset, indices: Mapping[str, np.ndarray], task: TaskSequence, step: int) -> tuple[int, int]:
    """Return the numbers of training and test images of a step."""
    from starseg.data.selection import select_step

    train = select_step(dataset.train, indices["training"], task, step, "train")
    return len(train), len(select_step(dataset.test, indices["test"], task, step, "test"))


def _training_images(
    spec: DatasetSpec, dataset: Dataset, indices: Mapping[str, np.ndarray], name: str, setting: Setting
) -> str:
    """Return the numbers of training images of a task's steps; "-" if the data set in the folder has other classes."""
    known = range(1, len(dataset.names))
    if not spec.domain_tasks and any(c not in known for step in spec.all_tasks[name] for c in step):
        return "-"
    task = spec.task(dataset.names, name, setting=setting)
    return ", ".join(f"{_counts(dataset, indices, task, step)[0]:,}" for step in range(len(task)))


def _print_tasks(spec: DatasetSpec, root: Path | None, setting: Setting, console: Console) -> None:
    """Print the tasks of a data set, and if its folder is given, the numbers of training images of their steps.

    Raises:
        UserError: the folder has another layout, or the setting is unknown.
    """
    tasks: Mapping[str, Steps | DomainSteps] = spec.domain_tasks or spec.all_tasks
    kind = "domains" if spec.domain_tasks else "classes"
    dataset, indices = _open(spec, root) if root else (None, {})
    table = Table("task", "also", "steps", f"{kind} of each step", box=None, pad_edge=False)
    if dataset:
        table.add_column(f"training images of each step, {setting}")
    for name, steps in tasks.items():
        also = ", ".join(alias for alias, target in spec.aliases.items() if target == name)
        row = [also, str(len(steps)), _sizes(steps)]
        if dataset:
            row.append(_training_images(spec, dataset, indices, name, setting))
        table.add_row(Text(name, "bold"), *row)
    images = " and ".join(f"{count:,} {split}" for split, count in spec.images.items())
    console.print(Text(f"{spec.title} ({spec.key}), {' and '.join(spec.settings)}"))
    if images:
        console.print(Text(f"published: {images} images"))
    if tasks:
        console.print(table)
    else:
        console.print("no published tasks; task.steps lists classes of each step, and `joint` is all in one step")
    console.print(f"\nstarseg tasks {spec.key} TASK: {kind} and images of each step", highlight=False)


def _print_steps(spec: DatasetSpec, name: str, root: Path | None, setting: Setting, console: Console) -> None:
    """Print the classes of each step, and if the data set is there, the numbers of training and test images.

    Raises:
        UserError: unknown task or setting, or the folder has another layout.
    """
    folder = root or spec.root
    dataset, indices = _open(spec, folder) if root or folder.is_dir() or not spec.names else (None, {})
    names = dataset.names if dataset else spec.class_names()
    task = spec.task(names, name, setting=setting)
    table = Table("step", "domains" if task.domains else "classes", box=None, pad_edge=False)
    for split in indices:
        table.add_column(f"{split} images", justify="right")
    for step in range(len(task)):
        counts = _counts(dataset, indices, task, step) if dataset else ()
        learnt = task.describe(step) if task.domains else task.list_names(task.new(step), limit=len(names))
        table.add_row(str(step), Text(learnt), *(f"{n:,}" for n in counts))
    console.print(Text(f"{spec.title} {task.name}, {setting}"))
    console.print(table)
    if not dataset:
        console.print(f"\n{folder} does not exist; --root FOLDER counts the images of each step", highlight=False)
