"""What a network was taught, step by step, as its step directories tell."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

from starseg.engine.checkpoint import StepInfo, is_finished, load_info
from starseg.utils.files import read_json


@dataclass(frozen=True)
class Lesson:
    """The classes of one step.

    Attributes:
        step: number of the step.
        classes: names of the classes that were new in it.
        method: method that taught them; None if the step's directory is gone.
        images: number of training images; 0 for a network that was trained elsewhere.
        date: UTC day on which the step's files were written; None if the step's directory is gone.
        origin: what the step was imported or adopted from; None if it was trained.
    """

    step: int
    classes: list[str]
    method: str | None = None
    images: int | None = None
    date: str | None = None
    origin: str | None = None


def read_history(step_dir: Path, info: StepInfo) -> list[Lesson]:
    """Return the lessons of a step and of all before it, the first step first.

    A run that continues another one holds a copy of its last step; the original is read where it still exists.
    """
    starts = [1 + sum(info.head_sizes[:step]) for step in range(info.step + 2)]
    names = [info.names[a:b] for a, b in pairwise(starts)]
    lessons = []
    folder: Path | None = step_dir.resolve()
    for step in reversed(range(info.step + 1)):
        folder = _original(folder)
        lessons.append(_lesson(folder, step, names[step]))
        folder = folder.parent / f"step_{step - 1}" if folder else None
    return lessons[::-1]


def _original(folder: Path | None) -> Path | None:
    """Follow copies of a step directory to the one in which it was trained or adopted."""
    while folder and is_finished(folder) and (origin := read_json(folder / "metrics.json").get("imported")):
        source = Path(origin)
        if not (source / "model.json").is_file() or source.resolve() == folder.resolve():
            break
        folder = source.resolve()
    return folder if folder and is_finished(folder) else None


def _lesson(folder: Path | None, step: int, classes: list[str]) -> Lesson:
    if folder is None:
        return Lesson(step, classes)
    metrics: dict[str, Any] = read_json(folder / "metrics.json")
    written = datetime.fromtimestamp((folder / "metrics.json").stat().st_mtime, timezone.utc)
    known = {"images": metrics.get("images"), "origin": metrics.get("imported")}
    return Lesson(step, classes, load_info(folder).method, **known, date=f"{written:%Y-%m-%d}")
