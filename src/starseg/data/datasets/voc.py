"""The PASCAL VOC 2012 layout, as in the README of the published code.

JPEGImages/*.jpg  SegmentationClassAug/*.png  SegmentationClass/*.png
ImageSets/Segmentation/train_aug.txt    lines "/JPEGImages/x.jpg /SegmentationClassAug/x.png"
ImageSets/Segmentation/val.txt          lines "x"
classes.txt                             optional: one class name per line, the background first
"""

from __future__ import annotations

import re
from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, distinct, read_lines
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.errors import UserError
from starseg.tasks import split_classes

VOC_NAMES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_LISTS = Path("ImageSets/Segmentation")
_EXPECTED = (
    "data.root must be a folder in the VOC layout: JPEGImages, SegmentationClassAug, SegmentationClass, "
    "ImageSets/Segmentation/{train_aug,val}.txt (docs/datasets.md)"
)


def _split(root: Path, name: str, mask_folder: str) -> Split:
    path = root / _LISTS / f"{name}.txt"
    lines, images, masks = read_lines(path, _EXPECTED), [], []
    for number, line in enumerate(lines, 1):
        match re.split(r"[ \t]+", line):
            case [image, mask]:
                images.append(root / image.lstrip("/"))
                masks.append(root / mask.lstrip("/"))
            case [stem]:
                images.append(root / "JPEGImages" / f"{stem}.jpg")
                masks.append(root / mask_folder / f"{stem}.png")
            case _:
                raise UserError(
                    f"{path}, line {number}: expected '/JPEGImages/x.jpg /{mask_folder}/x.png' or 'x', got {line!r}"
                )
    return Split(tuple(images), tuple(masks), tuple(lines))


def open_voc(root: Path) -> Dataset:
    """Open a data set in the VOC layout; classes not learnt yet count as background in tests.

    Raises:
        UserError: a list is missing, or a line has an unexpected format.
    """
    names_file = root / "classes.txt"
    names = distinct(read_lines(names_file, _EXPECTED), names_file) if names_file.is_file() else VOC_NAMES
    train, test = _split(root, "train_aug", "SegmentationClassAug"), _split(root, "val", "SegmentationClass")
    return VOC.dataset(root, train, test, names, published=names == VOC_NAMES)


# Permuted class orders of VOC 15-1 from the published experiments on class order.
_15_1_ORDERS = {
    "b": (12, 9, 20, 7, 15, 8, 14, 16, 5, 19, 4, 1, 13, 2, 11, 17, 3, 6, 18, 10),
    "c": (13, 19, 15, 17, 9, 8, 5, 20, 4, 3, 10, 11, 18, 16, 7, 12, 14, 6, 1, 2),
    "d": (15, 3, 2, 12, 14, 18, 20, 16, 11, 1, 19, 8, 10, 7, 17, 6, 5, 13, 9, 4),
    "e": (7, 5, 3, 9, 13, 12, 14, 19, 10, 2, 1, 4, 16, 8, 17, 15, 18, 6, 11, 20),
    "f": (7, 13, 5, 11, 9, 2, 15, 12, 14, 3, 20, 1, 16, 4, 18, 8, 6, 10, 19, 17),
    "g": (7, 5, 9, 1, 15, 18, 14, 3, 20, 10, 4, 19, 11, 17, 16, 12, 8, 6, 2, 13),
    "h": (12, 9, 19, 6, 4, 10, 5, 18, 14, 15, 16, 3, 8, 7, 11, 13, 2, 20, 17, 1),
    "i": (13, 10, 15, 8, 7, 19, 4, 3, 16, 12, 14, 11, 5, 20, 6, 2, 18, 9, 17, 1),
    "j": (1, 14, 9, 5, 2, 15, 8, 20, 6, 16, 18, 7, 11, 10, 19, 3, 4, 17, 12, 13),
    "k": (16, 13, 1, 11, 12, 18, 6, 14, 5, 3, 7, 9, 20, 19, 15, 4, 2, 10, 8, 17),
    "l": (10, 7, 6, 19, 16, 8, 17, 1, 14, 4, 9, 3, 15, 11, 12, 2, 18, 20, 13, 5),
    "m": (18, 4, 14, 17, 12, 10, 7, 3, 9, 1, 8, 15, 6, 13, 2, 5, 11, 20, 16, 19),
    "n": (5, 4, 13, 18, 14, 10, 19, 15, 7, 9, 3, 2, 8, 16, 20, 1, 12, 11, 6, 17),
    "o": (9, 12, 13, 18, 7, 1, 15, 17, 10, 8, 4, 5, 20, 16, 6, 14, 19, 11, 2, 3),
    "p": (9, 12, 13, 18, 2, 11, 15, 17, 10, 8, 4, 5, 20, 16, 6, 14, 19, 1, 7, 3),
    "q": (3, 14, 13, 18, 2, 11, 15, 17, 10, 8, 4, 5, 20, 16, 6, 12, 19, 1, 7, 9),
    "r": (3, 14, 13, 1, 2, 11, 15, 17, 7, 8, 4, 5, 9, 16, 19, 12, 6, 18, 10, 20),
    "s": (3, 14, 6, 1, 2, 11, 12, 17, 7, 20, 4, 5, 9, 16, 19, 15, 13, 18, 10, 8),
    "t": (3, 15, 13, 1, 2, 11, 18, 17, 7, 20, 8, 5, 9, 16, 19, 14, 6, 12, 10, 4),
    "u": (3, 15, 13, 14, 6, 11, 18, 17, 7, 20, 8, 4, 9, 16, 10, 1, 2, 12, 19, 5),
    "v": (1, 2, 12, 14, 6, 19, 18, 17, 5, 20, 8, 4, 9, 16, 10, 3, 15, 13, 11, 7),
    "w": (1, 2, 12, 14, 13, 19, 18, 7, 11, 20, 8, 4, 9, 16, 10, 3, 15, 6, 5, 17),
}
_ORDER = range(1, len(VOC_NAMES))

VOC = register_dataset(
    DatasetSpec(
        key="voc",
        title="PASCAL VOC 2012",
        root=Path("./datasets/PascalVOC2012"),
        open=open_voc,
        names=VOC_NAMES,
        tasks={
            "joint": (tuple(_ORDER),),
            **{n: split_classes(_ORDER, n) for n in ("19-1", "15-5", "15-1", "10-1", "10-5", "10-10", "5-3")},
            **{f"15-1_{letter}": split_classes(order, "15-1") for letter, order in _15_1_ORDERS.items()},
            "1-1": ((1,), (2,), (3,), (4,), (5,), (6, 7, 8, 9, 10)),
        },
        later_tasks={n: split_classes(_ORDER, n) for n in ("4-2", "2-2")},
        # As MiB's and PLOP's code name them: "s" is for sequential, one class in each step.
        aliases={
            "offline": "joint",
            "15-5s": "15-1",
            **{f"15-5s_{letter}": f"15-1_{letter}" for letter in _15_1_ORDERS},
        },
        images={"training": 10_582, "test": 1_449},
        sources=(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/index.html#devkit (images, SegmentationClass, val.txt)",
            "https://www.dropbox.com/s/oeu149j8qtbs1x0/SegmentationClassAug.zip",
            "https://github.com/cvlab-yonsei/DKD/releases/download/v1.0/train_aug.txt",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
