"""Test images of a run and the predictions of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from starseg.config import RunConfig, choices_for
from starseg.data.datasets.base import Dataset
from starseg.data.index import class_index
from starseg.data.samples import StepDataset
from starseg.engine.checkpoint import is_finished, load_model, runs_below
from starseg.engine.launch import make_fabric, single_process
from starseg.engine.run_data import RunData, dataset_and_task
from starseg.engine.rundir import load_run_config
from starseg.engine.setup import make_method
from starseg.errors import UserError
from starseg.methods import Method, prediction_rule
from starseg.models import Segmenter
from starseg.models.prediction import predict_upsampled
from starseg.tasks import TaskSequence

_BATCH = 8


def step_number(folder: Path) -> int:
    """Return the number of a step directory."""
    return int(folder.name.split("_")[1])


def finished_steps(run: Path) -> list[Path]:
    """Return the run's finished step directories, in order.

    Raises:
        UserError: there is none.
    """
    folders = sorted((p for p in run.glob("step_*") if is_finished(p)), key=step_number)
    if not folders:
        raise UserError(f"{run}: no finished step in this run directory{runs_below(run)}")
    return folders


@dataclass(frozen=True)
class TestSet:
    """Test images of a run's last finished step.

    Attributes:
        config, method, dataset, task: of the run.
        folders: its finished step directories.
        last: the number of the last of them.
        pixels: [M, 256] class index of the test split.
        positions: the images that show a class learnt so far.
        network: of a step directory, on the run's device.
    """

    __test__ = False

    config: RunConfig
    method: Method
    dataset: Dataset
    task: TaskSequence
    folders: list[Path]
    last: int
    pixels: np.ndarray
    positions: np.ndarray
    network: Callable[[Path], Segmenter]

    def samples(self, positions: np.ndarray, unlabelled: bool = False) -> tuple[Tensor, Tensor]:
        """Return test crops [N, 3, H, W] uint8 and their labels [N, H, W] uint8 training ids.

        Args:
            positions: the images.
            unlabelled: whether the labels show classes that are not labelled, where a model has seen them; otherwise
                these pixels are ignored.
        """
        classes = self.task.relabelling(self.last, "test", self.dataset.test_fill)
        if not unlabelled:
            classes[sorted(self.dataset.unlabelled)] = self.dataset.labels.ignored_id
        table = self.dataset.labels.compose(classes)
        crops = StepDataset(self.dataset.test, positions, table, self.config.data.crop, None)
        batch = [crops[0, i] for i in range(len(crops))]
        return torch.stack([b.images for b in batch]), torch.stack([b.labels for b in batch])

    @torch.inference_mode()
    def predict(self, folder: Path, images: Tensor) -> Tensor:
        """Predict training ids [N, H, W] of images [N, 3, H, W] uint8 with a step's model.

        Returns:
            uint8, or int32 with more than 254 classes.
        """
        model = self.network(folder)
        rule = prediction_rule(self.method, choices_for(self.config.compat), self.dataset.background)
        bf16 = self.config.eval.bf16
        kind = torch.int32 if self.task.wide else torch.uint8
        parts = []
        for batch in images.split(_BATCH):
            parts.append(predict_upsampled(rule, model.predict(batch, bf16), batch.shape[-2:]).to(kind).cpu())
        return torch.cat(parts)


def run_data(run: Path) -> tuple[RunConfig, Method, Dataset, TaskSequence]:
    """Open the configuration, method, data set and task of a run.

    Raises:
        UserError: no config.yaml, or the data set is not where it says.
    """
    config = load_run_config(run)
    method = make_method(config)
    return config, method, *dataset_and_task(config, method)


def open_test_set(run: Path) -> TestSet:
    """Open the test images of a run.

    Raises:
        UserError: no finished step, or the data set is not where the run's configuration says.
    """
    folders = finished_steps(run)
    config, method, dataset, task = run_data(run)
    pixels, last = class_index(dataset, dataset.test), step_number(folders[-1])
    positions = RunData(dataset, task, pixels[:0], pixels, config).positions(last, "test")
    device = make_fabric(single_process(config.train)).device

    @lru_cache(maxsize=4)
    def network(folder: Path) -> Segmenter:
        return load_model(folder)[0].to(device)

    return TestSet(config, method, dataset, task, folders, last, pixels, positions, network)
