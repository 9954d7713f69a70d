"""The command `starseg tasks`: published tasks of a data set, their steps, classes and numbers of images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from starseg.utils.terminal import make_console

if TYPE_CHECKING:
    from starseg.data.datasets import DatasetSpec
    from starseg.tasks import DomainSteps, Steps


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
    """List the published tasks of a data set; with a NAME, the classes and images of each step."""
    from starseg.data.datasets import find_dataset

    spec, console = find_dataset(dataset), make_console()
    if name is None:
        _print_tasks(spec, console)
    else:
        _print_steps(spec, name, root, setting or spec.settings[0], console)


def _sizes(steps: Steps | DomainSteps) -> str:
    """Return the numbers of classes or domains of the steps, such as "15, 5 steps of 1"."""
    runs = [(size, len(list(run))) for size, run in groupby(len(step) for step in steps)]
    return ", ".join(f"{count} steps of {size}" if count > 1 else str(size) for size, count in runs)


def _print_tasks(spec: DatasetSpec, console: Console) -> None:
    tasks: Mapping[str, Steps | DomainSteps] = spec.domain_tasks or spec.all_tasks
    kind = "domains" if spec.domain_tasks else "classes"
    table = Table("task", "also", "steps", f"{kind} of each step", box=None, pad_edge=False)
    for name, steps in tasks.items():
        also = ", ".join(alias for alias, target in spec.aliases.items() if target == name)
        table.add_row(Text(name, "bold"), also, str(len(steps)), _sizes(steps))
    console.print(Text(f"{spec.title} ({spec.key}), {' and '.join(spec.settings)}"))
    if tasks:
        console.print(table)
    else:
        console.print("no published tasks; task.steps lists classes of each step, and `joint` is all in one step")
    console.print(f"\nstarseg tasks {spec.key} TASK: {kind} and images of each step", highlight=False)


def _print_steps(spec: DatasetSpec, name: str, root: Path | None, setting: str, console: Console) -> None:
    """Print the classes of each step, and if the data set is there, the numbers of training and test images.

    Raises:
        UserError: unknown task or setting, or the folder has another layout.
    """
    from starseg.data.datasets import refuse_missing
    from starseg.data.index import class_index
    from starseg.data.selection import select_step

    folder = root or spec.root
    dataset = spec.open(folder) if root or folder.is_dir() or not spec.names else None
    names = dataset.names if dataset else spec.class_names()
    task = spec.task(names, name, setting=setting)  # type: ignore[arg-type]
    indices, splits = {}, dataset.splits if dataset else {}
    if dataset:
        refuse_missing(dataset)
        indices = {split: class_index(dataset, files) for split, files in splits.items()}
    table = Table("step", "domains" if task.domains else "classes", box=None, pad_edge=False)
    for split in indices:
        table.add_column(f"{split} images", justify="right")
    for step in range(len(task)):
        kinds = (("training", "train"), ("test", "test")) if dataset else ()
        counts = [len(select_step(splits[split], indices[split], task, step, kind)) for split, kind in kinds]  # type: ignore[arg-type]
        learnt = task.describe(step) if task.domains else task.list_names(task.new(step), limit=len(names))
        table.add_row(str(step), Text(learnt), *(f"{n:,}" for n in counts))
    console.print(Text(f"{spec.title} {task.name}, {setting}"))
    console.print(table)
    if not dataset:
        console.print(f"\n{folder} does not exist; --root FOLDER counts the images of each step", highlight=False)
