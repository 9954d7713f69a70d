"""Data set check before training: read every image and mask, count every class."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from starseg.config import RunConfig
from starseg.data.datasets import Split, find_dataset, list_dataset
from starseg.data.folders import some
from starseg.data.images import read_image, read_mask, refuse_other_size
from starseg.data.index import pixels_per_id
from starseg.data.labels import LabelMap
from starseg.engine.run_data import RunData, task_on
from starseg.engine.setup import make_method
from starseg.errors import UserError
from starseg.utils.machine import cores
from starseg.utils.progress import bar


@dataclass(frozen=True)
class BrokenFile:
    """File that a run could not use, with the reason."""

    split: str
    file: Path
    reason: str


@dataclass(frozen=True)
class Report:
    """Result of `starseg data check`.

    Attributes:
        data: the data set and its class counts; a file that cannot be read counts nothing.
        broken: every unusable file, in the order of the lists.
        seconds: how long reading took.
    """

    data: RunData
    broken: list[BrokenFile]
    seconds: float

    @property
    def task_problem(self) -> str | None:
        """Reason why the task cannot be trained on these files; None if it can."""
        try:
            self.data.check()
        except UserError as error:
            return str(error)
        return None

    def published(self, split: str) -> int | None:
        """Return the number of images in a split of the published data set; None for a data set with other classes."""
        return self.data.dataset.published.get(split)

    def missing(self, split: str) -> int:
        """Return how many images of the published split are missing."""
        return max(0, (self.published(split) or 0) - len(self.data.dataset.splits[split]))

    @property
    def repeated(self) -> list[str]:
        """Sentences about images that are listed more than once, under any link, or in both splits."""
        dataset, lines = self.data.dataset, []
        files = {name: Counter(map(os.path.realpath, split.images)) for name, split in dataset.splits.items()}
        for name, counter in files.items():
            if several := sorted(file for file, number in counter.items() if number > 1):
                lines.append(
                    f"{name}: {len(several):,} images are listed more than once and count as often: {some(several)}"
                )
        if both := sorted(files["training"].keys() & files["test"].keys()):
            lines.append(f"{len(both):,} test images are training images, so that results are too high: {some(both)}")
        return lines

    def counts(self, step: int) -> dict[str, Any]:
        """Count a step's images in both splits, and per new class the images that show it and its pixels."""
        chosen = {
            "training": self.data.train_pixels[self.data.positions(step, "train")],
            "test": self.data.test_pixels[self.data.positions(step, "test")],
        }
        return {
            "step": step,
            "images": {split: len(pixels) for split, pixels in chosen.items()},
            "classes": [
                {"id": c, "name": self.data.task.label(c)}
                | {
                    split: {"images": int((pixels[:, c] > 0).sum()), "pixels": int(pixels[:, c].sum(dtype=np.int64))}
                    for split, pixels in chosen.items()
                }
                for c in self.data.task.new(step)
            ],
        }

    def as_data(self) -> dict[str, Any]:
        """Return the whole report as plain data for a JSON file."""
        dataset = self.data.dataset
        return {
            "dataset": dataset.key,
            "root": str(dataset.root),
            "usable": not self.broken and not self.task_problem,
            "task_problem": self.task_problem,
            "splits": {
                name: {"images": len(split), "published": self.published(name), "missing": self.missing(name)}
                for name, split in dataset.splits.items()
            },
            "repeated": self.repeated,
            "broken": [{"split": b.split, "file": str(b.file), "reason": b.reason} for b in self.broken],
            "task": {"name": self.data.task.name, "setting": self.data.task.setting},
            "steps": [self.counts(step) for step in range(len(self.data.task))],
        }


def _inspect(image: Path, mask: Path, labels: LabelMap) -> tuple[np.ndarray, list[tuple[Path, str]]]:
    """Read a pair: return the number of mask pixels per class, int32, and the problems of both files."""
    counts, problems, sizes = np.zeros(labels.columns, np.int32), [], []
    try:
        sizes.append(read_image(image).shape[1:])
    except UserError as error:
        problems.append((image, str(error)))
    try:
        ids = read_mask(mask, wide=labels.wide)
        on_disk = pixels_per_id(ids, labels.columns)
        counts = labels.class_pixels(on_disk)
        if (unknown := np.flatnonzero(labels.unknown(on_disk))).size:
            problems.append((mask, f"ids {unknown.tolist()} are no classes ({labels})"))
        if sizes:
            refuse_other_size(sizes[0], ids.shape, mask)
    except UserError as error:
        problems.append((mask, str(error)))
    return counts, [(path, reason.removeprefix(f"{path}: ")) for path, reason in problems]


def _read(split: Split, name: str, labels: LabelMap, console: Console) -> Iterator[tuple[np.ndarray, list[BrokenFile]]]:
    """Inspect every pair of a split, on all cores."""
    with (
        ProcessPoolExecutor(cores()) as pool,
        bar(console, f"reading {name} files", len(split)) as shown,
    ):
        for counts, problems in pool.map(_inspect, split.images, split.masks, [labels] * len(split), chunksize=16):
            shown.advance()
            yield counts, [BrokenFile(name, path, reason) for path, reason in problems]


def check_data(config: RunConfig, console: Console) -> Report:
    """Read every image and mask of the configured data set.

    Args:
        config: names the data set and the task.
        console: where the progress bar goes.

    Raises:
        UserError: the folder has another layout, a split is empty, or the task does not fit the classes.
    """
    start = time.monotonic()
    dataset = list_dataset(config.data)
    task = task_on(dataset, config, make_method(config))
    pixels, broken = {}, []
    for name, split in dataset.splits.items():
        rows = np.zeros((len(split), dataset.labels.columns), np.int32)
        for row, (counts, problems) in zip(rows, _read(split, name, dataset.labels, console), strict=True):
            row[:] = counts
            broken += problems
        pixels[name] = rows
    data = RunData(dataset, task, pixels["training"], pixels["test"], config)
    return Report(data, broken, time.monotonic() - start)


def _steps_table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("class", no_wrap=True)
    for column in ("id", "train images", "pixels", "test images", "pixels"):
        table.add_column(column, justify="right")
    for step in map(report.counts, range(len(report.data.task))):
        images = step["images"]
        table.add_row(str(step["step"]), "all", "", f"{images['training']:,}", "", f"{images['test']:,}", "")
        for c in step["classes"]:
            figures = (f"{c[split][kind]:,}" for split in ("training", "test") for kind in ("images", "pixels"))
            table.add_row("", Text(c["name"]), str(c["id"]), *figures)
        table.add_section()
    return table


def _comparison(report: Report) -> list[str]:
    """Compare the image counts with the published ones, in sentences."""
    dataset, lines = report.data.dataset, []
    for name, split in dataset.splits.items():
        known, missing = report.published(name), report.missing(name)
        against = f"; published: {known:,}" + (f", {missing:,} missing" if missing else "") if known else ""
        lines.append(f"{name}: {len(split):,} images{against}")
    if any(map(report.missing, dataset.splits)):
        sources = find_dataset(dataset.key).sources
        rest = " The rest is available from" if sources else ""
        lines.append(f"A subset can be used, but its results are not comparable with published ones.{rest}")
        lines += [f"  {source}" for source in sources]
    return lines


def print_report(report: Report, console: Console) -> None:
    """Print the counts, missing and repeated images, and every broken file."""
    dataset, task = report.data.dataset, report.data.task

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    say(f"{dataset.root} ({dataset.key}): every image and mask read in {report.seconds:.1f} s")
    say(f"task {task.name}, {task.setting}: images of each step, images and pixels of each class")
    console.print(_steps_table(report))
    for line in [*_comparison(report), *report.repeated]:
        say(line)
    for b in report.broken:
        say(f"{b.file}: {b.reason} [{b.split}]")
    if report.broken:
        say(f"{len({b.file for b in report.broken})} broken files: fix them before training")
    if report.task_problem:
        say(f"the task cannot be trained on these files: {report.task_problem}")
    elif not report.broken:
        say("usable: no file is broken")
