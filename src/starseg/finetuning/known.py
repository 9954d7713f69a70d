"""What is known of the old classes of an adopted network, none of whose training images was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import resize as resize_image

from starseg.data.images import read_image
from starseg.engine import checkpoint
from starseg.errors import UserError
from starseg.inference.predictor import fitted_size, step_rule
from starseg.utils.files import read_json

_MOST_IMAGES = 64


@dataclass(frozen=True)
class KnownClasses:
    """What an adopted network's own predictions tell of its classes.

    Attributes:
        names: names of the classes, without the background.
        cells: [K] feature cells in the new images for which the network predicts each class.
        images: number of images looked at.
        derived: classes whose prototype is derived from the classifier's weights.
    """

    names: list[str]
    cells: list[int]
    images: int
    derived: list[str]


def adopted_figures(folder: Path) -> dict[str, object] | None:
    """Return what `starseg adopt` has written about a step; None for a step that starseg trained."""
    return read_json(folder / "metrics.json").get("adopted")


def check_background(folder: Path) -> None:
    """Check that an adopted network has a background, which new photos label everything else with.

    Raises:
        UserError: it has none.
    """
    figures = adopted_figures(folder)
    if figures and not figures["background"]:
        raise UserError(
            f"{folder}: this adopted network has no background class, and the masks of new photos label everything but "
            "the new class as background; only predict, eval, report, export and app take it"
        )


@torch.inference_mode()
def known_classes(folder: Path, images: Sequence[Path]) -> KnownClasses | None:
    """Predict new images with an adopted network; None for a step that starseg trained.

    Args:
        folder: the step directory.
        images: new images, of which up to 64 are looked at.
    """
    figures = adopted_figures(folder)
    if figures is None:
        return None
    model, info = checkpoint.load_model(folder)
    rule, cells = step_rule(info), torch.zeros(len(info.names), dtype=torch.int64)
    chosen = np.unique(np.linspace(0, len(images) - 1, _MOST_IMAGES).astype(int)).tolist()
    for index in chosen:
        image = read_image(images[index])
        height, width = image.shape[1:]
        size = fitted_size(height, width, info.crop, model.multiple)
        logits = model.predict(resize_image(image, list(size), antialias=True)[None])
        cells += torch.bincount(rule(logits).flatten(), minlength=len(cells))
    derived = figures.get("derived")
    return KnownClasses(
        info.names[1:], cells[1:].tolist(), len(chosen), [str(n) for n in derived] if isinstance(derived, list) else []
    )
