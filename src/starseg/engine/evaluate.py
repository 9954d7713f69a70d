"""Evaluation on the test split with an exact confusion matrix."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from starseg.config import Choices, RunConfig, choices_for
from starseg.data.index import class_index
from starseg.data.loader import PersistentLoader
from starseg.data.samples import Batch
from starseg.data.validation import open_splits
from starseg.engine.checkpoint import StepInfo
from starseg.engine.formats import open_run
from starseg.engine.launch import make_fabric, single_process
from starseg.engine.metrics import summarize_parts
from starseg.engine.run_data import RunData, workers_for
from starseg.engine.setup import make_method
from starseg.errors import UserError
from starseg.losses.reduction import AllReduceSum, identity
from starseg.methods import prediction_rule
from starseg.models import Segmenter
from starseg.models.prediction import predict_upsampled
from starseg.ops.labels import ignored_id
from starseg.tasks import TaskSequence
from starseg.utils.progress import track

_SCORING = ("data.", "eval.", "train.accelerator=")


def open_weights(weights: Path, overrides: Sequence[str]) -> tuple[Segmenter, StepInfo, RunConfig]:
    """Load a trained network and the configuration that determines its evaluation.

    Args:
        weights: a run's step directory, or a file in a registered format (:mod:`starseg.engine.formats`).
        overrides: changes of the configuration, "key=value".

    Raises:
        UserError: the step or file does not exist or is damaged, the step directory is outside its run, or an override
            has no effect on the evaluation.
    """
    if other := [text for text in overrides if not text.startswith(_SCORING)]:
        raise UserError(
            f"override {other[0]!r}: a trained step is scored as it is; only data.*, eval.* and train.accelerator "
            "can be changed"
        )
    return open_run(weights, overrides)


@torch.inference_mode()
def confusion_matrix(
    model: Segmenter,
    rule: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    all_reduce_sum: AllReduceSum = identity,
    bf16: bool = False,
) -> np.ndarray:
    """Compute the confusion matrix over all pixels that are not ignored, with the network in eval mode.

    Args:
        model: the network.
        rule: prediction rule, training ids [N, H, W] of logits [N, C, H, W].
        loader: uint8 batches, this process's share.
        all_reduce_sum: sum over processes.
        bf16: run the network in bf16 instead of float32.

    Returns:
        Pixel counts [1 + C, 1 + C] int64, rows are labels, columns predictions.
    """
    model.eval()
    classes = 1 + model.classes
    total = torch.zeros(classes**2, dtype=torch.int64, device=model.mean.device)
    for batch in loader:
        predicted = predict_upsampled(rule, model.predict(batch.images, bf16), batch.labels.shape[-2:])
        labels = batch.labels.to(predicted.device, non_blocking=True)
        counted, labels = labels != ignored_id(labels), labels.long()
        # torchmetrics, in deterministic mode, compares every pixel with every entry of the matrix, hence bincount.
        total += torch.bincount(classes * labels[counted] + predicted[counted], minlength=classes**2)
    return all_reduce_sum(total).view(classes, classes).cpu().numpy()


def score_step(
    parts: Sequence[np.ndarray],
    names: Sequence[str],
    base: int,
    choices: Choices,
    background: bool,
    unscored: np.ndarray,
) -> dict[str, Any]:
    """Return :func:`~starseg.engine.metrics.summarize_parts` of a step with these choices of the published code."""
    return summarize_parts(
        parts,
        names,
        base,
        iou_epsilon=choices.iou_epsilon,
        absent_as_zero=choices.absent_as_zero,
        background=background,
        unscored=unscored,
    )


def evaluate_model(model: Segmenter, info: StepInfo, config: RunConfig, console: Console) -> dict[str, Any]:
    """Evaluate a network on the test split of ``config.data``.

    Returns:
        The result of :func:`starseg.engine.metrics.summarize_parts`, and the matrix as "confusion".

    Raises:
        UserError: the class names of the data set differ from those of the network.
    """
    config = config.model_copy(update={"train": single_process(config.train)})
    fabric = make_fabric(config.train)
    dataset = replace(open_splits(config.data), test_fill=info.test_fill)
    ids = iter(info.dataset_ids[1:])
    steps = tuple(tuple(itertools.islice(ids, size)) for size in info.head_sizes)
    domains = tuple(map(tuple, info.domains))
    task = TaskSequence(info.task, steps, dataset.names, info.setting, info.base, domains)  # type: ignore[arg-type]
    last = len(task) - 1
    if list(task.class_names(last)) != info.names:
        raise UserError(f"its classes {info.names[1:]} have other names in {dataset.root}")
    pixels = class_index(dataset, dataset.test)
    loading = PersistentLoader(workers_for(config, fabric), pinned=fabric.device.type == "cuda")
    loaders = RunData(dataset, task, pixels[:0], pixels, config, loading).test_loaders(last)
    choices = choices_for(info.compat)
    rule = prediction_rule(make_method(config, info.method), choices, info.background)
    parts = []
    for loader in loaders:
        batches = track(console, "test", loader, len(loader))
        confusion = confusion_matrix(model.to(fabric.device), rule, batches, bf16=config.eval.bf16)
        parts.append(dataset.scored(confusion, info.dataset_ids))
    hidden = dataset.unscored(info.dataset_ids)
    scores = score_step(parts, info.names, info.base, choices, info.background, hidden)
    return {**scores, "confusion": np.sum(parts, axis=0).tolist()}
