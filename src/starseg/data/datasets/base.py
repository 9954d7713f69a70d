"""A data set on disk: image and mask files of two splits, class names and label map."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from starseg.data.images import is_image
from starseg.data.labels import LabelMap
from starseg.errors import UserError
from starseg.tasks import BACKGROUND
from starseg.utils.files import read_text, split_lines


@dataclass(frozen=True)
class Split:
    """Image and mask files of a split, in pairs.

    Attributes:
        images: image files.
        masks: mask files, in the same order.
        ids: published identifiers of the images, as used in memory and index files: for VOC the line of the list file,
            for ADE20K the file name without suffix.
        domains: domain of each image, such as the city where it was taken; empty if the data set has none.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    ids: tuple[str, ...]
    domains: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __add__(self, other: Split) -> Split:
        images, masks = self.images + other.images, self.masks + other.masks
        return Split(images, masks, self.ids + other.ids, self.domains + other.domains)

    def take(self, positions: Sequence[int] | np.ndarray) -> Split:
        """Return the files at the given positions."""
        images, masks = (tuple(files[i] for i in positions) for files in (self.images, self.masks))
        ids, domains = (tuple(names[i] for i in positions) if names else () for names in (self.ids, self.domains))
        return Split(images, masks, ids, domains)


NO_FILES = Split((), (), ())


def list_split(root: Path, images: str, masks: str, mask_suffix: str, layout: str) -> Split:
    """List the JPEG images of a folder, sorted by name, with the masks of the same stems; masks need not exist.

    Args:
        root: folder of the data set.
        images: folder of the images in it.
        masks: folder of the masks in it.
        mask_suffix: what follows the stem in the name of a mask.
        layout: end of the error message: what ``root`` must contain.

    Raises:
        UserError: there are no images.
    """
    files = tuple(sorted(filter(is_image, (root / images).glob("*.jpg"))))
    if not files:
        raise UserError(f"{root}: no {images}/*.jpg; {layout}")
    return Split(files, tuple(root / masks / f"{f.stem}{mask_suffix}" for f in files), tuple(f.stem for f in files))


@dataclass(frozen=True)
class Dataset:
    """Data set on disk.

    Attributes:
        key: key of its spec (:class:`starseg.data.datasets.spec.DatasetSpec`).
        root: its folder.
        names: class names by class id, the background first.
        train: training files.
        test: files of the validation split, on which results are reported.
        test_fill: label of classes not learnt yet in test labels: 0 (background) or 255 (ignored).
        labels: mapping from ids on disk to class ids.
        unlabelled: ids of classes that the annotated masks label as background; they are not scored. Masks may show
            them where a model has seen them, see :meth:`scored`.
        published: published number of images by split; empty if the classes are not the published ones.
        background: whether class id 0 is a background. If not, it stands for pixels of no class that the masks label.
        mask_ids: ids in predicted masks by class id; class ids that are not in it are written as they are.
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
    background: bool = True
    mask_ids: Mapping[int, int] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Split]:
        """Both splits by their name in messages."""
        return {"training": self.train, "test": self.test}

    def scored(self, confusion: np.ndarray, dataset_ids: Sequence[int]) -> np.ndarray:
        """Return a copy of a confusion matrix in which predictions of unlabelled classes count as background.

        Pixels in which a mask shows an unlabelled class may be this class or background: only their predictions as a
        labelled class remain, which are wrong in either case.

        Args:
            confusion: [1 + C, 1 + C] pixel counts, rows are labels, columns predictions.
            dataset_ids: class id of each row, the background first.
        """
        hidden = self.unscored(dataset_ids)
        folded = confusion.copy()
        folded[:, BACKGROUND] += confusion[:, hidden].sum(1)
        folded[:, hidden] = 0
        folded[hidden, BACKGROUND] = 0
        return folded

    def unscored(self, dataset_ids: Sequence[int]) -> np.ndarray:
        """Return [1 + C] bool, whether each class is unlabelled, so that it has no IoU."""
        return np.isin(dataset_ids, list(self.unlabelled))


def read_lines(path: Path, layout: str, errors: str = "strict") -> list[str]:
    """Read the non-empty lines of a text file, stripped.

    Args:
        path: the file.
        layout: the expected layout of `data.root`, appended to the error message.
        errors: "surrogateescape" for file names of any encoding.

    Raises:
        UserError: the file is unreadable.
    """
    try:
        return [line.strip() for line in split_lines(read_text(path, errors)) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
        raise UserError(f"{path}: cannot read this list ({reason}); {layout}") from error


def clean_name(text: str) -> str:
    """Return a class name in the form in which names are compared and listed.

    Each run of white space and line separators becomes a space, as files hold a name per line; letters with accents are
    composed (NFC), as some systems store them in two characters.
    """
    return unicodedata.normalize("NFC", " ".join(text.split()))


def distinct(names: Sequence[str], path: Path) -> tuple[str, ...]:
    """Return class names unchanged, after checking that they are distinct.

    Args:
        names: the class names.
        path: the file that contains them, for the error message.

    Raises:
        UserError: a name occurs twice.
    """
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: names a class twice: {', '.join(twice)}; give every class a name of its own")
    return tuple(names)


def refuse_missing(dataset: Dataset) -> None:
    """Check that every file of a data set exists.

    Raises:
        UserError: a split is empty or a file is missing; the message names the first missing file and their number.
    """
    for name, split in dataset.splits.items():
        if not len(split):
            raise UserError(f"{dataset.root}: its list of {name} images is empty; see docs/datasets.md")
        for kind, files in (("images", split.images), ("masks", split.masks)):
            if missing := [path for path in files if not path.is_file()]:
                raise UserError(
                    f"{len(missing)} of {len(files)} {name} {kind} are missing, the first is {missing[0]}; "
                    f"`starseg data check` lists them. If they were moved, correct their paths in the lists of "
                    f"{dataset.root}; docs/datasets.md says where to get published data sets"
                )
