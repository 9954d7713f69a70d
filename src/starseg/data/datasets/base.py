"""Data sets on disk: two lists of image and mask files, the class names, and how masks are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from starseg.data.labels import LabelMap
from starseg.errors import UserError
from starseg.tasks import BACKGROUND


@dataclass(frozen=True)
class Split:
    """Image and mask files, pairwise.

    Attributes:
        images: image files.
        masks: their masks.
        ids: their published identifiers, as memory and index files name them: VOC the line of the list file, ADE20K
            the file name without suffix.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def __add__(self, other: Split) -> Split:
        return Split(self.images + other.images, self.masks + other.masks, self.ids + other.ids)


NO_FILES = Split((), (), ())


@dataclass(frozen=True)
class Dataset:
    """Data set on disk.

    Attributes:
        key: of its spec (:class:`starseg.data.datasets.spec.DatasetSpec`).
        root: its folder.
        names: class names by class id, the background first.
        train: training files.
        test: files of the validation split, on which results are reported.
        test_fill: what classes not learnt yet become in test labels: 0 or 255.
        labels: class ids by id on disk.
        unlabelled: class ids that masks leave to the background wherever they are; they are not scored.
        published: published number of images by split; empty where these are not the published classes.
    """

    key: str
    root: Path
    names: tuple[str, ...]
    train: Split
    test: Split
    test_fill: int
    labels: LabelMap
    unlabelled: frozenset[int] = frozenset()
    published: Mapping[str, int] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Split]:
        """Both splits by their names in messages."""
        return {"training": self.train, "test": self.test}

    def scored(self, confusion: np.ndarray, dataset_ids: Sequence[int]) -> np.ndarray:
        """Return the confusion matrix with predictions of unlabelled classes counted as background.

        Args:
            confusion: [1 + C, 1 + C], rows the labels, columns the predictions.
            dataset_ids: class ids by row, the background first.
        """
        hidden = np.isin(dataset_ids, list(self.unlabelled))
        folded = confusion.copy()
        folded[:, BACKGROUND] += confusion[:, hidden].sum(1)
        folded[:, hidden] = 0
        return folded


def read_lines(path: Path, layout: str) -> list[str]:
    """Read the lines of a layout's list, stripped, without empty ones.

    Raises:
        UserError: unreadable; ``layout`` says what data.root must look like.
    """
    try:
        # Windows' editors begin a file with a byte order mark.
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise UserError(f"{path}: cannot read this list ({reason}); {layout}") from error


def distinct(names: Sequence[str], path: Path) -> tuple[str, ...]:
    """Return class names after checking that they are distinct.

    Raises:
        UserError: a name stands there twice.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: names a class twice: {', '.join(twice)}; give every class a name of its own")
    return tuple(names)


def refuse_missing(dataset: Dataset) -> None:
    """Refuse a data set with missing files.

    Raises:
        UserError: an empty split, or a missing file: names the first one and how many there are.
    """
    for name, split in dataset.splits.items():
        if not len(split):
            raise UserError(f"{dataset.root}: its list of {name} images is empty; see docs/datasets.md")
        for kind, files in (("images", split.images), ("masks", split.masks)):
            if missing := [path for path in files if not path.is_file()]:
                raise UserError(
                    f"{len(missing)} of {len(files)} {name} {kind} are missing, the first is {missing[0]}; "
                    "`starseg data check` lists them, docs/datasets.md says where to get them"
                )
