"""What every data set layout delivers: two lists of image and mask files, and the class names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from starseg.config import DataConfig
from starseg.errors import UserError


@dataclass(frozen=True)
class Split:
    """Image and mask files, pairwise."""

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
    """A data set on disk.

    Attributes:
        key: its layout ("voc", ...), which also names its published tasks and defaults.
        root: its folder.
        names: class names by dataset id, the background first.
        train: training files.
        test: files of the validation split, on which results are reported.
        test_fill: what classes not learnt yet become in test labels: 0 or 255.
    """

    key: str
    root: Path
    names: tuple[str, ...]
    train: Split
    test: Split
    test_fill: int


def check_files(key: str, split: Split) -> Split:
    """Return ``split`` if all its files exist.

    Raises:
        UserError: names the first missing file and how many there are.
    """
    if not len(split):
        raise UserError(f"{key}: the list of images is empty")
    missing = [p for p in (*split.images, *split.masks) if not p.is_file()]
    if missing:
        raise UserError(f"{key}: {len(missing)} listed files are missing, the first is {missing[0]}")
    return split


def open_dataset(config: DataConfig) -> Dataset:
    """Read the file lists of the configured data set."""
    from starseg.data.voc import open_voc

    return {"voc": open_voc}[config.dataset](config.root)
