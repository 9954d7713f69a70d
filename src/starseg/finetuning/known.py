"""What is known of the old classes of an adopted network, none of whose training images was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
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
T = TypeVar("T")


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
        unlabelled: [K] cells likewise in unlabelled photos; None if there are none.
        unlabelled_images: number of these looked at.
    """

    names: list[str]
    cells: list[int]
    images: int
    derived: list[str]
    stored: list[int] | None = None
    unlabelled: list[int] | None = None
    unlabelled_images: int = 0

    @property
    def absent(self) -> list[str]:
        """Names of the classes of which nothing is known."""
        nothing = [0] * len(self.names)
        columns = (self.cells, self.stored or nothing, self.unlabelled or nothing)
        return [name for name, *cells in zip(self.names, *columns, strict=True) if not sum(cells)]


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
def known_classes(
    folder: Path, photos: Sequence[tuple[Path, Path]], new: Sequence[int], unlabelled: Sequence[Path] = ()
) -> KnownClasses | None:
    """Predict new images with an adopted network; None for a step that starseg trained.

    Cells of new classes are left out, because the network can only be wrong there.

    Args:
        folder: the step directory.
        photos: new images and their masks of dataset ids, of which up to 64 are looked at.
        new: dataset ids of the new classes.
        unlabelled: unlabelled images, likewise.
    """
    figures = adopted_figures(folder)
    if figures is None:
        return None
    model, info = checkpoint.load_model(folder)
    rule = step_rule(info)

    def predicted(path: Path) -> Tensor:
        """Return the training ids [1, h, w] of an image's cells."""
        image = read_image(path)
        height, width = image.shape[1:]
        size = fitted_size(height, width, info.crop, model.multiple)
        return rule(model.predict(resize_image(image, list(size), antialias=True)[None]))

    cells, shown = torch.zeros(2, len(info.names), dtype=torch.int64)
    chosen, more = _some(photos), _some(unlabelled)
    for path, labels in chosen:
        ids = predicted(path)
        fresh = torch.from_numpy(np.isin(np.asarray(read_mask(labels)), new)).float()[None, None]
        rest = interpolate(fresh, ids.shape[-2:], mode="nearest")[:, 0] == 0
        cells += torch.bincount(ids[rest], minlength=len(cells))
    for path in more:
        shown += torch.bincount(predicted(path).flatten(), minlength=len(shown))
    state = checkpoint.load_bank(folder)
    return KnownClasses(
        names=info.names[1:],
        cells=cells[1:].tolist(),
        images=len(chosen),
        derived=list(figures.get("derived", ())),
        stored=state["counts"][1:].long().tolist() if GaussianBank.fits(state) else None,
        unlabelled=shown[1:].tolist() if more else None,
        unlabelled_images=len(more),
    )


def _some(items: Sequence[T]) -> list[T]:
    """Return up to 64 items, evenly spaced."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, _MOST_IMAGES).astype(int))] if items else []
