"""A model of given final features in place of a network, as the golden training steps use it."""

from types import SimpleNamespace

import torch
from torch import Tensor

from starseg.config import PUBLISHED
from starseg.data.samples import Batch
from starseg.methods import METHODS, StepContext
from starseg.methods.star import Star
from starseg.models import Output
from starseg.tasks import TaskSequence


class Heads:
    """1x1 heads over a table of features; a batch's "images" are row numbers of that table."""

    def __init__(self, features: list[Tensor], weight: Tensor, bias: Tensor) -> None:
        self.features, self.weight, self.bias = features, weight, bias

    def classify(self, features: Tensor) -> Tensor:
        return torch.einsum("cd,n...d->n...c", self.weight, features) + self.bias

    def __call__(self, images: Tensor, extra_features: Tensor | None = None) -> Output:
        features = self.features[int(images)]
        logits = self.classify(features.movedim(1, -1)).movedim(-1, 1)
        extra = None if extra_features is None else self.classify(extra_features)
        return Output(features, logits, extra)


def numbered(labels: list[Tensor]) -> list[Batch]:
    return [Batch(torch.tensor(i), y, torch.arange(len(y))) for i, y in enumerate(labels)]


def star_context(setting: str, n_old: int, n_new: int, batches: list[Batch], stride: int, old: object) -> StepContext:
    names = tuple(f"class{i}" for i in range(1 + n_old + n_new))
    steps = (tuple(range(1, n_old + 1)), tuple(range(n_old + 1, n_old + n_new + 1)))
    return StepContext(
        task=TaskSequence("golden", steps, names, setting),
        step=1,
        choices=PUBLISHED,
        model=SimpleNamespace(stride=stride, mean=torch.zeros(1)),
        old_model=old,
        iterations=len(batches),
        scan=lambda name: iter(batches),
        generator=torch.Generator().manual_seed(0),
    )


def star(**options: float) -> Star:
    return METHODS["star"](Star.Options(**options))
