"""Access to the golden values of the baselines: $STARSEG_GOLDEN_METHODS, by default tests/data/golden_methods.

Sizes are read from the arrays, so that a folder with others serves as well.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from starseg.data.samples import Batch
from starseg.methods import METHODS, Method, StepContext
from starseg.models import Output
from starseg.tasks import TaskSequence

FOLDER = Path(os.environ.get("STARSEG_GOLDEN_METHODS") or Path(__file__).parents[1] / "data" / "golden_methods")


def golden(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(value)) for key, value in file.items()}


def step_context(old: int, new: int, **changed: object) -> StepContext:
    """Step 1 of a task with ``old`` and ``new`` classes."""
    steps = (tuple(range(1, old + 1)), tuple(range(old + 1, old + new + 1)))
    settings = {
        "task": TaskSequence("golden", steps, tuple(f"class{i}" for i in range(1 + old + new))),
        "step": 1,
        "model": SimpleNamespace(mean=torch.zeros(1), stride=1),
        "old_model": object(),
        "iterations": 1,
        "scan": lambda name: iter(()),
        "generator": torch.Generator(),
    }
    return StepContext(**{**settings, **changed})


def make_method(name: str, ctx: StepContext, dataset: str = "voc", **options: object) -> Method:
    """A method with a recipe in the midst of a step, without what :meth:`Method.begin_step` would measure."""
    cls = METHODS[name]
    method = cls(cls.Options(**cls.complete_options(cls.Options(**options), cls.recipes[dataset])))
    method.ctx = ctx
    return method


def batch_of(labels: Tensor, **extras: Tensor) -> Batch:
    return Batch(torch.zeros(len(labels), 1), labels, torch.arange(len(labels)), extras)


def answering(logits: Tensor, features: Tensor | None = None, maps: list[Tensor] | None = None) -> Callable:
    """A network that gives these outputs whatever it is asked."""
    if features is None:
        features = torch.zeros(len(logits), 1, 1, 1)
    output = Output(features, logits, maps=maps)
    return lambda images, extra_features=None, maps=False: output
