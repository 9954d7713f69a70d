"""Selection of the images of a step."""

from __future__ import annotations

from typing import Literal

import numpy as np

from starseg.tasks import BACKGROUND, IGNORE, TaskSequence

Kind = Literal["train", "val", "test"]


def select_images(pixels: np.ndarray, task: TaskSequence, step: int, kind: Kind) -> np.ndarray:
    """Return the positions of the images that a step sees (docs/reference/star.md, "The protocol").

    Args:
        pixels: [N, 256] class index.
        task: the task.
        step: the step.
        kind: "train" and "val" need a pixel of a new class (disjoint training moreover no class of a later step or
            outside the task), "test" one of any class seen so far.

    Returns:
        int64, ascending.
    """
    present = pixels > 0
    wanted = task.seen(step) if kind == "test" else task.new(step)
    keep = present[:, list(wanted)].any(1)
    if kind == "train" and task.setting == "disjoint":
        allowed = [BACKGROUND, IGNORE, *task.seen(step)]
        keep &= ~np.delete(present, allowed, axis=1).any(1)
    return np.flatnonzero(keep)
