"""Cityscapes as in STAR's journal version: 19 classes, everything else is background.

leftImg8bit/{train,val}/<city>/<image>_leftImg8bit.png
gtFine/{train,val}/<city>/<image>_gtFine_labelIds.png
fine_train.txt, fine_val.txt    optional: lines "leftImg8bit/....png gtFine/....png"
"""

from __future__ import annotations

from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, read_lines
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.errors import UserError
from starseg.tasks import split_classes

# Class names by id in the masks, in the order of the trainIds.
_NAMES = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_ORDER = range(1, 1 + len(_NAMES))
_IMAGE, _MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
_EXPECTED = (
    "data.root must be a folder in the layout of Cityscapes: leftImg8bit/{train,val}/<city>/*_leftImg8bit.png, "
    "gtFine/{train,val}/<city>/*_gtFine_labelIds.png (docs/datasets.md)"
)


def _split(root: Path, name: str) -> Split:
    path = root / f"fine_{name}.txt"
    if path.is_file():
        pairs = [line.split() for line in read_lines(path, _EXPECTED)]
        if wrong := [number for number, pair in enumerate(pairs, 1) if len(pair) != 2]:
            raise UserError(f"{path}, line {wrong[0]}: expected 'leftImg8bit/....png gtFine/....png'")
        images, masks = ([root / pair[side].lstrip("/") for pair in pairs] for side in (0, 1))
    else:
        images = sorted(root.glob(f"leftImg8bit/{name}/*/*{_IMAGE}"))
        masks = [root / "gtFine" / name / i.parent.name / i.name.replace(_IMAGE, _MASK) for i in images]
    if not images:
        raise UserError(f"{root}: no leftImg8bit/{name}/<city>/*{_IMAGE}; {_EXPECTED}")
    return Split(tuple(images), tuple(masks), tuple(image.name.removesuffix(_IMAGE) for image in images))


def open_cityscapes(root: Path) -> Dataset:
    """Open a folder in the layout of Cityscapes; classes not learnt yet count as background in tests.

    Raises:
        UserError: there are no images, or a line of a list has an unexpected format.
    """
    return CITY.dataset(root, _split(root, "train"), _split(root, "val"))


CITY = register_dataset(
    DatasetSpec(
        key="city",
        title="Cityscapes",
        root=Path("./datasets/CityScapes"),
        open=open_cityscapes,
        names=("background", *_NAMES.values()),
        label_map={**dict.fromkeys(range(34), 0), **dict(zip(_NAMES, _ORDER, strict=True))},
        tasks={
            "joint": (tuple(_ORDER),),
            **{name: split_classes(_ORDER, name) for name in ("14-1", "14-5", "13-1", "13-6")},
        },
        images={"training": 2_975, "test": 500},
        sources=(
            "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
