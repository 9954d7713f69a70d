"""Evaluation on the test split: an exact confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from starseg.data.step import Batch
from starseg.losses import AddUp, alone, resize
from starseg.models import Segmenter
from starseg.tasks import IGNORE


@torch.inference_mode()
def confusion_matrix(
    model: Segmenter, rule: Callable[[Tensor], Tensor], loader: Iterable[Batch], add_up: AddUp = alone
) -> np.ndarray:
    """Confusion over all pixels that are not ignored, model in eval mode and float32.

    Args:
        model: the network.
        rule: training ids [N, H, W] from logits [N, C, H, W].
        loader: uint8 batches, this process's share.
        add_up: over processes.

    Returns:
        [1 + C, 1 + C] int64, rows the labels, columns the predictions.
    """
    model.eval()
    classes = 1 + sum(model.head_sizes)
    total = torch.zeros(classes, classes, dtype=torch.int64, device=model.mean.device)
    for batch in loader:
        logits = model(model.normalize(batch.images)).logits
        predicted = rule(resize(logits, batch.labels.shape[-2:]))
        labels = batch.labels.to(predicted.device).long()
        total += multiclass_confusion_matrix(predicted, labels, classes, ignore_index=IGNORE, validate_args=False)
    return add_up(total).cpu().numpy()
