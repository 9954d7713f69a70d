"""What is known of the old classes of an adopted network, none of whose training images was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2.functional import resize as resize_image

from starseg.data.images import read_image
from starseg.engine import checkpoint
from starseg.errors import UserError
from starseg.finetuning.defaults import EXTEND
from starseg.inference.predictor import fitted_size, step_rule
from starseg.replay.gaussians import GaussianBank
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
        stored: [K] stored cells of each class, from which replayed features are drawn; None if there is no such bank.
    """

    names: list[str]
    cells: list[int]
    images: int
    derived: list[str]
    stored: list[int] | None = None


def adopted_figures(folder: Path) -> dict[str, Any] | None:
    """Return what `starseg adopt` has written about a network; None for one that starseg trained.

    Args:
        folder: step directory of the network, or of a later step that was learnt on top of it in the same run.
    """
    earlier = sorted(folder.resolve().parent.glob("step_*/metrics.json"), key=lambda path: path.stat().st_mtime)
    for path in (folder / "metrics.json", *earlier):
        if path.is_file() and (figures := read_json(path).get("adopted")):
            return figures
    return None


def has_background(folder: Path) -> bool:
    """Return whether a network has a background; all have one but some adopted ones."""
    figures = adopted_figures(folder)
    return figures is None or bool(figures["background"])


def check_background(folder: Path, method: str) -> None:
    """Check that a method can continue from an adopted network without a background.

    Raises:
        UserError: it takes all other pixels of new photos for background.
    """
    if not has_background(folder) and method != EXTEND:
        raise UserError(
            f"{folder}: this adopted network has no background class, and {method} takes everything but the new class "
            f"in new photos for background; leave --method out ({EXTEND} keeps the network's predictions there)"
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
    state = checkpoint.load_bank(folder)
    stored = state["counts"][1:].long().tolist() if GaussianBank.fits(state) else None
    return KnownClasses(info.names[1:], cells[1:].tolist(), len(chosen), list(figures.get("derived", ())), stored)
