"""A few iterations of a step, which tell how long its training will take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import NamedTuple

from starseg.data.samples import Batch
from starseg.engine.fit import StepTraining
from starseg.engine.step import Step
from starseg.utils.clock import Clock


class StageTime(NamedTuple):
    """The time of one iteration in a stage of a step.

    Attributes:
        name: name of the stage.
        epochs: number of its epochs.
        crops: :attr:`~starseg.methods.protocol.Stage.crops`.
        images: seconds per iteration on images.
        features: seconds per iteration on features that are held in memory; None if the stage holds none.
    """

    name: str
    epochs: int
    crops: int
    images: float
    features: float | None

    def total(self, iterations: int) -> float:
        """Estimate the seconds of the stage.

        Args:
            iterations: number of batches in one pass over the images.
        """
        if self.features is None:
            return self.images * iterations * (self.epochs + 1)  # One more for the passes before and after training.
        return iterations * self.crops * (self.images + self.epochs * self.features)


class TrialStep(Step):
    """A step of which a few iterations are run and measured; nothing is saved."""

    def stage_times(self, iterations: int) -> list[StageTime]:
        """Measure the seconds per iteration of each stage, without the first of the iterations (at least 2)."""
        ctx, memory = self._context()
        times = []
        for index, stage in enumerate(self.method.stages(ctx)):
            ctx = self._stage_context(ctx, memory, stage)
            training = self._begin(ctx, iterations, 1e-6, Clock(self.fabric.device), index)
            ctx.model.train()
            loader = self.data.train_loader(self.number, range(iterations), True, memory.files)
            images = _seconds(training, itertools.islice(loader, iterations))
            features = _seconds(training, self._loader(training, memory)) if stage.crops else None
            times.append(StageTime(stage.name, self._schedule(stage)[0], stage.crops, images, features))
        return times


def _seconds(training: StepTraining, batches: Iterable[Batch]) -> float:
    """Return the mean seconds per iteration, without the first."""
    marks = []
    for batch in batches:
        losses = training.iterate(batch)
        sum(value.item() for value in losses.values())  # Waits for a GPU.
        marks.append(time.monotonic())
    return (marks[-1] - marks[0]) / (len(marks) - 1)
