"""What is known of the old classes of an adopted network, none of whose training images was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import resize as resize_image

from starseg.data.images import read_image, read_mask
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
        cells: [K] feature cells in the new images, outside of the new classes, for which the network predicts each
            class.
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
def known_classes(folder: Path, photos: Sequence[tuple[Path, Path]], new: Sequence[int]) -> KnownClasses | None:
    """Predict new images with an adopted network; None for a step that starseg trained.

    Cells of new classes are left out, because the network can only be wrong there.

    Args:
        folder: the step directory.
        photos: new images and their masks of dataset ids, of which up to 64 are looked at.
        new: dataset ids of the new classes.
    """
    figures = adopted_figures(folder)
    if figures is None:
        return None
    model, info = checkpoint.load_model(folder)
    rule, cells = step_rule(info), torch.zeros(len(info.names), dtype=torch.int64)
    chosen = np.unique(np.linspace(0, len(photos) - 1, _MOST_IMAGES).astype(int)).tolist()
    for index in chosen:
        image, mask = read_image(photos[index][0]), np.asarray(read_mask(photos[index][1]))
        height, width = image.shape[1:]
        size = fitted_size(height, width, info.crop, model.multiple)
        logits = model.predict(resize_image(image, list(size), antialias=True)[None])
        fresh = torch.from_numpy(np.isin(mask, new)).float()[None, None]
        rest = interpolate(fresh, logits.shape[-2:], mode="nearest")[:, 0] == 0
        cells += torch.bincount(rule(logits)[rest], minlength=len(cells))
    state = checkpoint.load_bank(folder)
    stored = state["counts"][1:].long().tolist() if GaussianBank.fits(state) else None
    return KnownClasses(info.names[1:], cells[1:].tolist(), len(chosen), list(figures.get("derived", ())), stored)
