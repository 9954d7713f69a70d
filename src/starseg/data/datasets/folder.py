"""The prepared layout of a user's own photos and masks, written by `starseg learn` and read by a run.

classes.txt            one class name per line in order of class ids, the background first
train.txt, val.txt     per line an image, a tab and its mask; paths are relative to the prepared folder, or absolute
masks/**/*.png         palette PNGs of class ids
learn.json             origin of the data, the ids of the classes labelled in the masks ("labelled"), and where they
                       are not the defaults, whether there is a background and the ids in predicted masks ("mask_ids")
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, distinct, read_lines
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.errors import UserError
from starseg.tasks import IGNORE
from starseg.utils.files import read_json, write_lines

_EXPECTED = "data.root must be a folder prepared by `starseg learn`: classes.txt, train.txt, val.txt (docs/learn.md)"
_SEPARATORS = set("\t\n\r")


def write_list(path: Path, pairs: Iterable[tuple[Path, Path]]) -> None:
    """Write a list of image and mask paths, one tab-separated pair per line; names may be of any encoding.

    Raises:
        UserError: a path contains a tab or a line break.
    """
    rows = [(str(image), str(mask)) for image, mask in pairs]
    if wrong := next((name for row in rows for name in row if _SEPARATORS & set(name)), None):
        raise UserError(f"{wrong!r}: a tab or line break in the name of a file or folder cannot be listed; rename it")
    write_lines(path, (f"{image}\t{mask}" for image, mask in rows))


def _read_split(root: Path, name: str) -> Split:
    rows = [line.split("\t") for line in read_lines(root / name, _EXPECTED, errors="surrogateescape")]
    if wrong := [row for row in rows if len(row) != 2]:
        raise UserError(f"{root / name}: expected 'image<tab>mask' a line, got {wrong[0]}")
    images, masks = zip(*rows, strict=True) if rows else ((), ())
    ids = tuple(str(Path(p).with_suffix("")) for p in masks)
    return Split(tuple(root / p for p in images), tuple(root / p for p in masks), ids)


def open_folder(root: Path) -> Dataset:
    """Open a prepared folder; classes that are not labelled in its masks are not scored.

    Raises:
        UserError: the folder has another layout.
    """
    names = distinct(read_lines(root / "classes.txt", _EXPECTED), root / "classes.txt")
    about = root / "learn.json"
    told = read_json(about) if about.is_file() else {}
    labelled = told.get("labelled", range(len(names)))
    unlabelled = frozenset(range(1, len(names))) - frozenset(labelled)
    train, val = _read_split(root, "train.txt"), _read_split(root, "val.txt")
    dataset = FOLDER.dataset(root, train, val, names, unlabelled=unlabelled)
    mask_ids = {int(class_id): value for class_id, value in told.get("mask_ids", {}).items()}
    if told.get("background", True):
        return replace(dataset, mask_ids=mask_ids)
    return replace(dataset, mask_ids=mask_ids, background=False, test_fill=IGNORE)


FOLDER = register_dataset(DatasetSpec(key="folder", title="prepared folder", root=Path("./learn"), open=open_folder))
