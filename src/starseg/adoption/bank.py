"""A prototype bank without old images: from a network's own predictions on unlabelled photos, and from its weights.

Shape letters: K classes, D feature channels, h w feature cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import resize as resize_image

from starseg.data.images import read_image
from starseg.errors import UserError
from starseg.inference.predictor import fitted_size
from starseg.models import Segmenter
from starseg.models.classifiers import BACKGROUND, SIGMOID, last_layer, linear_classifier
from starseg.replay.bank import PrototypeBank
from starseg.replay.derivation import derive_prototypes
from starseg.replay.statistics import FeatureStatistics
from starseg.tasks import BACKGROUND as BACKGROUND_ID
from starseg.tasks import IGNORE

# Logit, relative to the background's, above which a cell counts as one of its class: that of STAR's old-class labels.
_CONFIDENT = 0.5


@dataclass(frozen=True)
class MeasuredBank:
    """A bank, and what it is known from.

    Attributes:
        bank: the bank of all classes.
        cells: [K] feature cells found of each class.
        images: number of photos.
    """

    bank: PrototypeBank
    cells: list[int]
    images: int


@torch.no_grad()
def to_sigmoid(model: Segmenter) -> Segmenter:
    """Return the network with one logit per class, relative to the background's, as STAR needs it.

    The class of the largest logit above 0, else the background, is the class of the softmax's largest logit.
    """
    background, head = last_layer(model.lead[BACKGROUND]), last_layer(model.heads[0])
    assert head.bias is not None and background.bias is not None
    converted = Segmenter(model.architecture, model.encoder, model.decoder, model.head_sizes, SIGMOID).eval()
    target = last_layer(converted.heads[0])
    assert target.bias is not None
    target.weight.copy_(head.weight - background.weight)
    target.bias.copy_(head.bias - background.bias)
    return converted


@torch.inference_mode()
def measure_bank(model: Segmenter, photos: Sequence[Path], crop: int) -> MeasuredBank:
    """Measure the bank of a network on its own confident predictions.

    A class that is never predicted gets a prototype derived from the classifier's weights; its count, noise and norms
    are means over the classes that are predicted (of the counts, the median).

    Args:
        model: network with a logit per class (:func:`to_sigmoid`).
        photos: unlabelled images.
        crop: short side in pixels to which they are resized.

    Raises:
        UserError: no class is predicted in any photo.
    """
    statistics = FeatureStatistics.zeros(model.classes, model.width)
    for photo in photos:
        image = read_image(photo)
        height, width = image.shape[1:]
        size = fitted_size(height, width, crop, model.multiple)
        output = model(model.normalize(resize_image(image, list(size), antialias=True)[None]))
        statistics.update(output.features, _labels(output.logits))
    bank = statistics.finish()
    if not bank.present.any():
        raise UserError(
            f"--photos: the network finds none of its classes in {len(photos)} photos; give photos that show them"
        )
    return MeasuredBank(_complete(bank, model), statistics.counts[1:].tolist(), len(photos))


def _labels(logits: Tensor) -> Tensor:
    """Return the ids [N, h, w] of cells that are confidently a class, or the background; the others are ignored."""
    best, winner = logits.max(1)
    return torch.where(best > _CONFIDENT, winner + 1, torch.where(best > 0, IGNORE, BACKGROUND_ID))


def _complete(bank: PrototypeBank, model: Segmenter) -> PrototypeBank:
    """Fill in the classes without a cell."""
    shown = bank.present
    derived = derive_prototypes(*linear_classifier(model.heads)) if not shown.all() else bank.prototypes

    def filled(values: Tensor) -> Tensor:
        return torch.where(shown.view(-1, *[1] * (values.ndim - 1)), values, values[shown].mean(0))

    counts = torch.where(shown, bank.counts[1:], bank.counts[1:][shown].median())
    return PrototypeBank(
        counts=torch.cat([bank.counts[:1], counts]),
        prototypes=torch.where(shown[:, None], bank.prototypes, derived),
        noise=filled(bank.noise),
        norm_mean=filled(bank.norm_mean),
        norm_std=filled(bank.norm_std),
    )
