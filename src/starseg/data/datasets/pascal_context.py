"""Pascal Context with its 59 most frequent classes, as converted by mmsegmentation: no background, 0 is ignored.

JPEGImages/x.jpg
SegmentationClassContext/x.png                    ids 1 to 59 in alphabetical order, 0 is everything else
ImageSets/SegmentationContext/{train,val}.txt     lines "x"
"""

from __future__ import annotations

from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, read_lines
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.tasks import IGNORE

_NAMES_TEXT = """
aeroplane, bag, bed, bedclothes, bench, bicycle, bird, boat, book, bottle, building, bus, cabinet, car, cat, ceiling,
chair, cloth, computer, cow, cup, curtain, dog, door, fence, floor, flower, food, grass, ground, horse, keyboard,
light, motorbike, mountain, mouse, person, plate, platform, pottedplant, road, rock, sheep, shelves, sidewalk, sign,
sky, snow, sofa, table, track, train, tree, truck, tvmonitor, wall, water, window, wood
"""
_NAMES = tuple(" ".join(_NAMES_TEXT.split()).split(", "))
_CLASSES = range(1, 1 + len(_NAMES))
_EXPECTED = (
    "data.root must be the folder VOC2010 as mmsegmentation's pascal_context.py completes it: JPEGImages, "
    "SegmentationClassContext, ImageSets/SegmentationContext/{train,val}.txt (docs/datasets.md)"
)
# The unseen classes of ZS3Net (Bucher et al., NeurIPS 2019), of which each split takes two more, learnt after the rest.
_UNSEEN = ("cow", "motorbike", "sofa", "cat", "boat", "fence", "bird", "tvmonitor", "aeroplane", "keyboard")


def _later(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the steps of the split with ``count`` unseen classes."""
    later = tuple(1 + _NAMES.index(name) for name in _UNSEEN[:count])
    return tuple(c for c in _CLASSES if c not in later), later


def _split(root: Path, name: str) -> Split:
    stems = read_lines(root / "ImageSets" / "SegmentationContext" / f"{name}.txt", _EXPECTED)
    images = tuple(root / "JPEGImages" / f"{stem}.jpg" for stem in stems)
    masks = tuple(root / "SegmentationClassContext" / f"{stem}.png" for stem in stems)
    return Split(images, masks, tuple(stems))


def open_pascal_context(root: Path) -> Dataset:
    """Open the folder VOC2010 with the masks of Pascal Context.

    Raises:
        UserError: a list is missing.
    """
    return PASCAL_CONTEXT.dataset(root, _split(root, "train"), _split(root, "val"))


PASCAL_CONTEXT = register_dataset(
    DatasetSpec(
        key="pascal_context",
        title="Pascal Context 59",
        root=Path("./datasets/VOCdevkit/VOC2010"),
        open=open_pascal_context,
        names=_NAMES,
        background=False,
        label_map={class_id: class_id for class_id in _CLASSES},
        ignored=(0,),
        test_fill=IGNORE,
        later_tasks={
            "joint": (tuple(_CLASSES),),
            **{f"{len(_NAMES) - count}-{count}": _later(count) for count in (2, 4, 6, 8, 10)},
        },
        recipe="voc",
        images={"training": 4_998, "test": 5_105},
        sources=(
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
            "https://github.com/open-mmlab/mmsegmentation (trainval_merged.json, "
            "tools/dataset_converters/pascal_context.py)",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
