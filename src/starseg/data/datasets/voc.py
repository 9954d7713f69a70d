"""The PASCAL VOC 2012 layout, exactly as the published README gives it.

JPEGImages/*.jpg  SegmentationClassAug/*.png  SegmentationClass/*.png
ImageSets/Segmentation/train_aug.txt    lines "/JPEGImages/x.jpg /SegmentationClassAug/x.png"
ImageSets/Segmentation/val.txt          lines "x"
classes.txt                             optional: one class name a line, background first
"""

from __future__ import annotations

from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, distinct, read_lines
from starseg.errors import UserError

VOC_NAMES = [
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
]
_LISTS = Path("ImageSets/Segmentation")
_EXPECTED = (
    "data.root must be a folder in the VOC layout: JPEGImages, SegmentationClassAug, SegmentationClass, "
    "ImageSets/Segmentation/{train_aug,val}.txt (docs/datasets.md)"
)


def _split(root: Path, name: str, mask_folder: str) -> Split:
    path = root / _LISTS / f"{name}.txt"
    lines, images, masks = read_lines(path, _EXPECTED), [], []
    for number, line in enumerate(lines, 1):
        match line.split():
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
        UserError: a list is missing, or a line has another form.
    """
    names_file = root / "classes.txt"
    names = read_lines(names_file, _EXPECTED) if names_file.is_file() else VOC_NAMES
    train = _split(root, "train_aug", "SegmentationClassAug")
    return Dataset(
        "voc", root, distinct(names, names_file), train, _split(root, "val", "SegmentationClass"), test_fill=0
    )
