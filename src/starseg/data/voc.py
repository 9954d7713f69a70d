"""The PASCAL VOC 2012 layout, exactly as the published README gives it.

JPEGImages/*.jpg  SegmentationClassAug/*.png  SegmentationClass/*.png
ImageSets/Segmentation/train_aug.txt    lines "/JPEGImages/x.jpg /SegmentationClassAug/x.png"
ImageSets/Segmentation/val.txt          lines "x"
classes.txt                             optional: one class name a line, background first
"""

from __future__ import annotations

from pathlib import Path

from starseg.data.dataset import Dataset, Split, check_files
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


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this list ({error.strerror}); data.root must be a folder in the VOC layout: "
            "JPEGImages, SegmentationClassAug, SegmentationClass, ImageSets/Segmentation/{train_aug,val}.txt"
        ) from error


def _split(root: Path, name: str, mask_folder: str) -> Split:
    images, masks = [], []
    lines = _lines(root / _LISTS / f"{name}.txt")
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
                    f"{root / _LISTS / name}.txt, line {number}: expected '/JPEGImages/x.jpg /{mask_folder}/x.png' "
                    f"or 'x', got {line!r}"
                )
    return check_files(f"{root / _LISTS / name}.txt", Split(tuple(images), tuple(masks), tuple(lines)))


def open_voc(root: Path) -> Dataset:
    """Open a data set in the VOC layout; classes not learnt yet count as background in tests.

    Raises:
        UserError: a list or a listed file is missing, or a line has another form.
    """
    names_file = root / "classes.txt"
    names = _lines(names_file) if names_file.is_file() else VOC_NAMES
    train = _split(root, "train_aug", "SegmentationClassAug")
    return Dataset("voc", root, tuple(names), train, _split(root, "val", "SegmentationClass"), test_fill=0)
