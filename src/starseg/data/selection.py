"""Selection of a step's images."""

from __future__ import annotations

from typing import Literal

import numpy as np

from starseg.data.datasets.base import Split
from starseg.tasks import BACKGROUND, IGNORE, TaskSequence

Kind = Literal["train", "val", "test"]


def shown_classes(pixels: np.ndarray) -> np.ndarray:
    """Return which classes each image shows, [N, C] bool by class id, without background and ignored pixels.

    Args:
        pixels: [N, C] class index; of 256 columns, 255 is for ignored pixels, and a wider index has no such column.
    """
    present = pixels > 0
    present[:, BACKGROUND] = False
    if pixels.shape[1] == IGNORE + 1:
        present[:, IGNORE] = False
    return present


def select_step(split: Split, pixels: np.ndarray, task: TaskSequence, step: int, kind: Kind) -> np.ndarray:
    """Select the images of a step by their domains if the task has domains, else by the classes they show.

    Args:
        split: the files.
        pixels: [len(split), 256] their class index.
        task: the task.
        step: number of the step.
        kind: "train" and "val" select images of the step's domains, "test" those of all domains seen so far; without
            domains, see :func:`select_images`.

    Returns:
        Positions of the images, int64, ascending.
    """
    if not task.domains:
        return select_images(pixels, task, step, kind)
    return np.flatnonzero(np.isin(split.domains, task.domains_of(step, seen=kind == "test")))


def select_images(pixels: np.ndarray, task: TaskSequence, step: int, kind: Kind) -> np.ndarray:
    """Select the images of a step (docs/reference/star.md, "The protocol").

    Args:
        pixels: [N, 256] class index.
        task: the task.
        step: number of the step.
        kind: "train" and "val" select images with a pixel of a new class (in the disjoint setting, "train" excludes
            images that show a class of a later step or outside the task), "test" images with a pixel of any class seen
            so far.

    Returns:
        Positions of the images, int64, ascending.
    """
    present = shown_classes(pixels)
    wanted = task.seen(step) if kind == "test" else task.new(step)
    keep = present[:, list(wanted)].any(1)
    if kind == "train" and task.setting == "disjoint":
        keep &= ~np.delete(present, list(task.seen(step)), axis=1).any(1)
    return np.flatnonzero(keep)
