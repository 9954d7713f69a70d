"""COCO-Stuff: 171 classes of things and stuff, without a background; unlabelled pixels are ignored.

164k, as downloaded or as converted by mmsegmentation:
images/{train2017,val2017}/x.jpg
annotations/{train2017,val2017}/x.png                  ids 0 to 181, 255 unlabelled
annotations/{train2017,val2017}/x_labelTrainIds.png    ids 0 to 170, 255 unlabelled; read if there is no x.png

10k, as converted by mmsegmentation:
images/{train2014,test2014}/x.jpg
annotations/{train2014,test2014}/x_labelTrainIds.png   ids 1 to 171, 0 unlabelled
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from starseg.data.datasets.base import Dataset, Split, list_split
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.tasks import IGNORE

_NAMES_TEXT = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush,
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile,
cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other,
floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other,
hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow,
plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf,
sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel,
tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
waterdrops, window-blind, window-other, wood
"""
_NAMES = tuple(" ".join(_NAMES_TEXT.split()).split(", "))
# Categories of COCO without a segmented object: street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door,
# blender, hair brush. The ids in the masks are the categories less one.
_WITHOUT_OBJECTS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
_IDS = [category - 1 for category in range(1, 183) if category not in _WITHOUT_OBJECTS]
_CLASSES = range(1, 1 + len(_NAMES))
_TRAIN_IDS = "_labelTrainIds.png"
# The unseen classes of SPNet (Xian et al., CVPR 2019), learnt after the other 156.
_UNSEEN_TEXT = """
frisbee, skateboard, cardboard, carrot, scissors, suitcase, giraffe, cow, road, wall-concrete, tree, grass, river,
clouds, playingfield
"""
_UNSEEN = tuple(" ".join(_UNSEEN_TEXT.split()).split(", "))
_LATER = tuple(1 + _NAMES.index(name) for name in _UNSEEN)
_TASKS = {"joint": (tuple(_CLASSES),), "156-15": (tuple(c for c in _CLASSES if c not in _LATER), _LATER)}


def _split(root: Path, name: str, mask_suffix: str, layout: str) -> Split:
    return list_split(root, f"images/{name}", f"annotations/{name}", mask_suffix, layout)


def open_164k(root: Path) -> Dataset:
    """Open COCO-Stuff 164k with the masks of the download, or where these are missing, those of mmsegmentation.

    Raises:
        UserError: there are no images.
    """
    layout = (
        "data.root must be a folder with images/{train2017,val2017}/x.jpg and annotations/{train2017,val2017}/x.png "
        "(docs/datasets.md)"
    )
    folder = root / "annotations" / "train2017"
    plain = any(not path.name.endswith(_TRAIN_IDS) for path in folder.glob("*.png"))
    converted = not plain and any(folder.glob(f"*{_TRAIN_IDS}"))
    suffix = _TRAIN_IDS if converted else ".png"
    spec = replace(COCO_STUFF_164K, label_map=None) if converted else COCO_STUFF_164K
    train, test = (_split(root, name, suffix, layout) for name in ("train2017", "val2017"))
    return spec.dataset(root, train, test)


def open_10k(root: Path) -> Dataset:
    """Open COCO-Stuff 10k as mmsegmentation converts it.

    Raises:
        UserError: there are no images.
    """
    layout = (
        "data.root must be a folder written by mmsegmentation's coco_stuff10k.py: images/{train2014,test2014}/x.jpg, "
        f"annotations/{{train2014,test2014}}/x{_TRAIN_IDS} (docs/datasets.md)"
    )
    train, test = (_split(root, name, _TRAIN_IDS, layout) for name in ("train2014", "test2014"))
    return COCO_STUFF_10K.dataset(root, train, test)


COCO_STUFF_164K = register_dataset(
    DatasetSpec(
        key="coco_stuff164k",
        title="COCO-Stuff 164k",
        root=Path("./datasets/coco_stuff164k"),
        open=open_164k,
        names=_NAMES,
        background=False,
        label_map=dict(zip(_IDS, _CLASSES, strict=True)),
        test_fill=IGNORE,
        later_tasks=_TASKS,
        recipe="ade",
        images={"training": 118_287, "test": 5_000},
        sources=(
            "http://images.cocodataset.org/zips/train2017.zip and val2017.zip",
            "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
COCO_STUFF_10K = register_dataset(
    DatasetSpec(
        key="coco_stuff10k",
        title="COCO-Stuff 10k",
        root=Path("./datasets/coco_stuff10k"),
        open=open_10k,
        names=_NAMES,
        background=False,
        label_map={class_id: class_id for class_id in _CLASSES},
        ignored=(0,),
        test_fill=IGNORE,
        later_tasks=_TASKS,
        recipe="ade",
        images={"training": 9_000, "test": 1_000},
        sources=(
            "https://github.com/nightrome/cocostuff10k",
            "https://github.com/open-mmlab/mmsegmentation (tools/dataset_converters/coco_stuff10k.py)",
            "(docs/datasets.md says what goes where)",
        ),
    )
)
