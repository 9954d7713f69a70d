"""Cityscapes as a data set of one's own: masks with 34 ids, of which 19 are classes (docs/new-dataset.md).

    export STARSEG_DATASETS=examples/cityscapes.py
    starseg data check cityscapes.yaml

leftImg8bit/{train,val}/<city>/<image>_leftImg8bit.png
gtFine/{train,val}/<city>/<image>_gtFine_labelIds.png
"""

from pathlib import Path

from starseg.data.datasets import Dataset, DatasetSpec, Split, register_dataset
from starseg.errors import UserError
from starseg.tasks import split_classes

# Class names by id in the masks; every other id is ignored.
NAMES = {
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
ORDER = range(1, 1 + len(NAMES))


def read_split(root: Path, name: str) -> Split:
    images = sorted(root.glob(f"leftImg8bit/{name}/*/*_leftImg8bit.png"))
    if not images:
        raise UserError(f"{root}: no leftImg8bit/{name}/<city>/*_leftImg8bit.png; give Cityscapes' folder as data.root")
    ids = [image.name.removesuffix("_leftImg8bit.png") for image in images]
    masks = [root / "gtFine" / name / i.split("_")[0] / f"{i}_gtFine_labelIds.png" for i in ids]
    return Split(tuple(images), tuple(masks), tuple(ids))


def open_cityscapes(root: Path) -> Dataset:
    return CITYSCAPES.dataset(root, read_split(root, "train"), read_split(root, "val"))


CITYSCAPES = register_dataset(
    DatasetSpec(
        key="cityscapes",
        title="Cityscapes",
        root=Path("./datasets/cityscapes"),
        open=open_cityscapes,
        names=("background", *NAMES.values()),
        label_map=dict(zip(NAMES, ORDER, strict=True)),
        ignored=set(range(34)) - set(NAMES),
        test_fill=255,
        tasks={name: split_classes(ORDER, name) for name in ("13-6", "13-1", "14-5", "14-1")},
        images={"training": 2975, "test": 500},
        sources=("https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",),
    )
)
