"""ADE20K-Full: 847 classes in masks of 16 bits, as MaskFormer's prepare_ade20k_full_sem_seg.py writes them.

images_detectron2/{training,validation}/x.jpg
annotations_detectron2/{training,validation}/x.tif    ids 0 to 846, 65535 is everything else
classes.txt                                           optional: one class name per line, that of id 0 first
"""

from __future__ import annotations

from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, distinct, list_split, read_lines
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.errors import UserError
from starseg.tasks import IGNORE

_CLASSES = 847
_EXPECTED = (
    "data.root must be the folder ADE20K_2021_17_01 as MaskFormer's prepare_ade20k_full_sem_seg.py completes it: "
    "images_detectron2/{training,validation}/x.jpg, annotations_detectron2/{training,validation}/x.tif "
    "(docs/datasets.md)"
)


def _split(root: Path, name: str) -> Split:
    return list_split(root, f"images_detectron2/{name}", f"annotations_detectron2/{name}", ".tif", _EXPECTED)


def open_ade_full(root: Path) -> Dataset:
    """Open the prepared folder; without a classes.txt, the names of the classes are the numbers 1 to 847.

    Raises:
        UserError: there are no images, or classes.txt does not name 847 classes.
    """
    path, names = root / "classes.txt", ADE_FULL.names
    if path.is_file():
        names = distinct(read_lines(path, _EXPECTED), path)
        if len(names) != _CLASSES:
            raise UserError(f"{path}: expected {_CLASSES} class names, one a line, got {len(names)}")
    return ADE_FULL.dataset(root, _split(root, "training"), _split(root, "validation"), names)


ADE_FULL = register_dataset(
    DatasetSpec(
        key="ade_full",
        title="ADE20K-Full",
        root=Path("./datasets/ADE20K_2021_17_01"),
        open=open_ade_full,
        names=tuple(map(str, range(1, 1 + _CLASSES))),
        background=False,
        test_fill=IGNORE,
        later_tasks={"joint": (tuple(range(1, 1 + _CLASSES)),)},
        recipe="ade",
        images={"training": 25_574, "test": 2_000},
        sources=(
            "https://groups.csail.mit.edu/vision/datasets/ADE20K (ADE20K_2021_17_01.zip)",
            "https://github.com/facebookresearch/MaskFormer (datasets/prepare_ade20k_full_sem_seg.py)",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
