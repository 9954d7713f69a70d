"""Default hyper-parameters of `starseg learn`, for folders of ten to thousands of images.

The published schedule is made for 10,000 photos: 60 epochs of batches of 24, so 720 iterations or more even for the
smallest class, at a learning rate of 1e-4 (1e-3 in the first step). A small folder gets more epochs but fewer
iterations, and a higher learning rate to compensate (docs/learn.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

RECIPE = "voc"
"""Data set whose recipe gives what is not derived from the folder."""
BATCH = (2, 16)
EPOCHS = (10, 100)
CROP = (128, 512)
OLD_SHARE = 5
"""Maximum number of replayed cells of old classes per cell of the new images."""
CLASSIFIER_ITERATIONS = 400
"""Minimum number of iterations of a classifier on features that are held in memory."""


@dataclass(frozen=True)
class FolderSchedule:
    """Schedule of a step, as a function of the number of images.

    Attributes:
        iterations: minimum number of iterations, unless that takes more epochs than ``EPOCHS`` allows.
        lr_budget: learning rate times iterations.
        rates: bounds of the learning rate.
    """

    iterations: int
    lr_budget: float
    rates: tuple[float, float]

    def epochs(self, images: int) -> int:
        """Return the number of epochs for a number of training images."""
        least, most = EPOCHS
        return min(most, max(least, -(-self.iterations // (images // batch_size(images)))))

    def learning_rate(self, iterations: int) -> float:
        """Return the learning rate for a number of iterations."""
        least, most = self.rates
        return float(f"{min(most, max(least, self.lr_budget / iterations)):.2g}")


# The lower bounds and the budget of LATER are those of the published VOC 15-1 (500 photos a class: 1200 iterations),
# the upper bounds and the budget of FIRST those of the run on the VOC subset (benchmarks/README.md).
FIRST = FolderSchedule(iterations=600, lr_budget=7.5, rates=(1e-3, 1e-2))
LATER = FolderSchedule(iterations=400, lr_budget=0.125, rates=(1e-4, 1e-3))


def method_for(source: str | None) -> str:
    """Return the method of a new step by default.

    Args:
        source: method of the step to continue from; None for a first step.
    """
    return "constellation" if source in (None, "constellation") else "star"


def classifier_epochs(iterations: int, least: int) -> int:
    """Return the number of epochs for a number of iterations per epoch, ``least`` or more."""
    return max(least, -(-CLASSIFIER_ITERATIONS // iterations))


def batch_size(images: int) -> int:
    """Return a quarter of the number of training images, within bounds."""
    least, most = BATCH
    return max(least, min(most, images // 4))


def crop_size(short_sides: Sequence[int], multiple: int) -> int:
    """Return the images' median short side, rounded to a multiple of ``multiple`` pixels, within bounds."""
    least, most = CROP
    fitted = min(max(round(median(short_sides) / multiple) * multiple, least), most)
    return int(fitted) // multiple * multiple or multiple


def replay_share(stored: float, cells: int) -> float:
    """Return the fraction of the stored cells of old classes to replay with new images of so many cells."""
    return float(f"{min(1.0, OLD_SHARE * cells / max(stored, 1.0)):.3g}")
