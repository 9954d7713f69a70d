"""ADE20K in the layout of the scene parsing benchmark (ADEChallengeData2016).

images/{training,validation}/x.jpg
annotations/{training,validation}/x.png     ids 1..150, 0 "other"
objectInfo150.txt                           tab separated: Idx Ratio Train Val Name
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, read_lines
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.data.images import is_image
from starseg.errors import UserError
from starseg.tasks import IGNORE, split_classes

ADE_CLASSES = 150
_UNPACKED = "ADEChallengeData2016"
_HEADER = ["Idx", "Ratio", "Train", "Val", "Name"]


def _expected(root: Path) -> str:
    """Return the end of an error message: what ``root`` must contain, or where the data seems to be instead."""
    for place in (root / _UNPACKED, root.parent / _UNPACKED):
        if place.is_dir() and place != root:
            return f"the data seem to lie in {place}: give data.root={place}"
    return (
        "data.root must be a folder in the ADE20K layout, as ADEChallengeData2016.zip unpacks: "
        "images/{training,validation}, annotations/{training,validation}, objectInfo150.txt (docs/datasets.md)"
    )


def read_names(root: Path) -> tuple[str, ...]:
    """Read the class names by class id from objectInfo150.txt, "other" first.

    A name is the text before the first comma, or the whole text if two names would otherwise be equal.

    Raises:
        UserError: the file is missing or is not the table of 150 classes.
    """
    path = root / "objectInfo150.txt"
    lines = read_lines(path, _expected(root))
    rows = [[cell.strip() for cell in line.split("\t")] for line in lines]
    if not rows or rows[0] != _HEADER:
        got = lines[0] if lines else ""
        raise UserError(f"{path}: expected a tab-separated table with the header {_HEADER}, got {got!r}")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(_HEADER) or row[0] != str(number) or not row[-1]:
            raise UserError(f"{path}: expected row {number} to be '{number} Ratio Train Val Name', got {row}")
    if len(rows) != 1 + ADE_CLASSES:
        raise UserError(f"{path}: expected {ADE_CLASSES} classes, got {len(rows) - 1}; take the file of the download")
    full = ["other", *(row[-1] for row in rows[1:])]
    short = [name.split(",")[0].strip() for name in full]
    times = Counter(short)
    return tuple(s if times[s] == 1 else f for s, f in zip(short, full, strict=True))


def read_split(root: Path, name: str) -> Split:
    """List the images of a split ("training" or "validation"), sorted by name, with their masks.

    The masks are not checked for existence.

    Raises:
        UserError: a folder is missing or contains no images.
    """
    images, masks = root / "images" / name, root / "annotations" / name
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"{folder}: this folder is missing; {_expected(root)}")
    files = sorted(filter(is_image, images.glob("*.jpg")))
    if not files:
        raise UserError(f"{images}: expected *.jpg images, found none; {_expected(root)}")
    return Split(tuple(files), tuple(masks / f"{f.stem}.png" for f in files), tuple(f.stem for f in files))


def open_ade(root: Path) -> Dataset:
    """Open a data set in the ADE20K layout; classes not learnt yet are ignored (255) in tests.

    Raises:
        UserError: the folder has another layout.
    """
    names = read_names(root)
    return ADE.dataset(root, read_split(root, "training"), read_split(root, "validation"), names)


_ORDER = range(1, 1 + ADE_CLASSES)

ADE = register_dataset(
    DatasetSpec(
        key="ade",
        title="ADE20K",
        root=Path("./datasets/ADE20K"),
        open=open_ade,
        # Placeholders for when the data set is not available: the names are part of the download.
        names=("other", *map(str, _ORDER)),
        test_fill=IGNORE,
        tasks={
            "joint": (tuple(_ORDER),),
            **{name: split_classes(_ORDER, name) for name in ("100-50", "100-10", "100-5", "50-50")},
        },
        # As MiB's and PLOP's code name them.
        aliases={"offline": "joint", "50": "50-50"},
        images={"training": 20_210, "test": 2_000},
        sources=(
            "http://sceneparsing.csail.mit.edu/ (ADEChallengeData2016.zip)",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
