"""Cityscapes, for classes that arrive one after another (`city`) and for cities that do (`city_domain`).

leftImg8bit/{train,val}/<city>/<image>_leftImg8bit.png
gtFine/{train,val}/<city>/<image>_gtFine_labelIds.png         or, where there are none, <image>_gtFine_labelTrainIds.png
fine_train.txt, fine_val.txt    optional (`city`): lines "leftImg8bit/....png gtFine/....png"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from starseg.data.datasets.base import Dataset, Split, read_lines
from starseg.data.datasets.spec import DatasetSpec, register_dataset
from starseg.data.labels import LabelMap
from starseg.errors import UserError
from starseg.tasks import BACKGROUND, IGNORE, DomainSteps, split_classes

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
_VOID = set(range(34)) - _NAMES.keys()
_BY_LABEL_ID = dict(zip(_NAMES, _ORDER, strict=True))
_BY_TRAIN_ID = {class_id - 1: class_id for class_id in _ORDER}
_IMAGE, _LABEL_IDS, _TRAIN_IDS = "_leftImg8bit.png", "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"
_EXPECTED = (
    "data.root must be a folder in the layout of Cityscapes: leftImg8bit/{train,val}/<city>/*_leftImg8bit.png, "
    "gtFine/{train,val}/<city>/*_gtFine_labelIds.png (docs/datasets.md)"
)
# In the order of PLOP's code, dataset/cityscapes_domain.py; the last three are those of the validation images.
_CITIES = (
    *("aachen", "bremen", "darmstadt", "erfurt", "hanover", "krefeld", "strasbourg", "tubingen", "weimar", "bochum"),
    *("cologne", "dusseldorf", "hamburg", "jena", "monchengladbach", "stuttgart", "ulm", "zurich"),
    *("frankfurt", "lindau", "munster"),
)
_TRAIN_SHARE = 0.8


def _split(root: Path, name: str) -> Split:
    path = root / f"fine_{name}.txt"
    if not path.is_file():
        return _listed(root, name)
    pairs = [line.split() for line in read_lines(path, _EXPECTED)]
    if wrong := [number for number, pair in enumerate(pairs, 1) if len(pair) != 2]:
        raise UserError(f"{path}, line {wrong[0]}: expected 'leftImg8bit/....png gtFine/....png'")
    images, masks = (tuple(root / pair[side].lstrip("/") for pair in pairs) for side in (0, 1))
    return Split(images, masks, _ids(images))


def _listed(root: Path, name: str) -> Split:
    """List the images of a folder, "train" or "val", and their masks of labelIds, or else of trainIds."""
    images = tuple(sorted(root.glob(f"leftImg8bit/{name}/*/*{_IMAGE}")))
    if not images:
        raise UserError(f"{root}: no leftImg8bit/{name}/<city>/*{_IMAGE}; {_EXPECTED}")
    folder = root / "gtFine" / name
    plain = any(folder.glob(f"*/*{_LABEL_IDS}")) or not any(folder.glob(f"*/*{_TRAIN_IDS}"))
    suffix = _LABEL_IDS if plain else _TRAIN_IDS
    masks = tuple(folder / image.parent.name / image.name.replace(_IMAGE, suffix) for image in images)
    return Split(images, masks, _ids(images), tuple(image.parent.name for image in images))


def _ids(images: Iterable[Path]) -> tuple[str, ...]:
    return tuple(image.name.removesuffix(_IMAGE) for image in images)


def _has_train_ids(root: Path, masks: Iterable[Path]) -> bool:
    """Whether masks hold trainIds instead of labelIds.

    Raises:
        UserError: some do and some do not.
    """
    kinds = {mask.name.endswith(_TRAIN_IDS) for mask in masks}
    if len(kinds) > 1:
        raise UserError(f"{root}: some masks are *{_LABEL_IDS}, others *{_TRAIN_IDS}; give all of one kind")
    return kinds == {True}


def open_cityscapes(root: Path) -> Dataset:
    """Open a folder in the layout of Cityscapes; classes not learnt yet count as background in tests.

    Raises:
        UserError: there are no images, a line of a list has an unexpected format, or masks of two kinds are mixed.
    """
    train, test = _split(root, "train"), _split(root, "val")
    dataset = CITY.dataset(root, train, test)
    if not _has_train_ids(root, train.masks + test.masks):
        return dataset
    # In these files, 255 is what the other ids on disk are in the files of labelIds: the background of this protocol.
    return replace(dataset, labels=LabelMap({**_BY_TRAIN_ID, IGNORE: BACKGROUND}, frozenset()))


def open_city_domain(root: Path) -> Dataset:
    """Open Cityscapes with the city of each image as its domain; of each city's images, a fifth are for tests.

    As in PLOP's code, the cities of training and validation images are used alike, and the images are divided after a
    shuffle with seed 1. PLOP divides the images of all cities of a step at once; here, each city's are divided by
    themselves, so that test images are never training images of another step.

    Raises:
        UserError: there are no images, or masks of two kinds are mixed.
    """
    images = _listed(root, "train") + _listed(root, "val")
    train: list[int] = []
    for city in sorted(set(images.domains)):
        places = np.flatnonzero(np.array(images.domains) == city)
        np.random.RandomState(1).shuffle(places)
        train += places[: int(_TRAIN_SHARE * len(places))].tolist()
    test = sorted(set(range(len(images))) - set(train))
    label_map = _BY_TRAIN_ID if _has_train_ids(root, images.masks) else _BY_LABEL_ID
    spec = replace(CITY_DOMAIN, label_map=label_map, ignored=() if label_map is _BY_TRAIN_ID else _VOID)
    return spec.dataset(root, images.take(sorted(train)), images.take(test))


_SOURCES = (
    "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",
    "(docs/datasets.md says what goes where)",
)

CITY = register_dataset(
    DatasetSpec(
        key="city",
        title="Cityscapes",
        root=Path("./datasets/CityScapes"),
        open=open_cityscapes,
        names=("background", *_NAMES.values()),
        label_map={**dict.fromkeys(_VOID, BACKGROUND), **_BY_LABEL_ID},
        tasks={
            "joint": (tuple(_ORDER),),
            **{name: split_classes(_ORDER, name) for name in ("14-1", "14-5", "13-1", "13-6")},
        },
        later_tasks={"10-1": split_classes(_ORDER, "10-1")},
        recipe="voc",
        images={"training": 2_975, "test": 500},
        sources=_SOURCES,
    )
)


def _city_steps(base: int, later: int) -> DomainSteps:
    rest = range(base, len(_CITIES), later)
    return (_CITIES[:base], *(_CITIES[i : i + later] for i in rest))


CITY_DOMAIN = register_dataset(
    DatasetSpec(
        key="city_domain",
        title="Cityscapes, a domain for each city",
        root=Path("./datasets/CityScapes"),
        open=open_city_domain,
        names=tuple(_NAMES.values()),
        background=False,
        label_map=_BY_LABEL_ID,
        ignored=_VOID,
        test_fill=IGNORE,
        settings=("domain",),
        domain_tasks={
            "joint": (_CITIES,),
            "11-5": _city_steps(11, 5),
            "11-1": _city_steps(11, 1),
            "1-1": _city_steps(1, 1),
        },
        aliases={"offline": "joint"},
        recipe="voc",
        sources=_SOURCES,
    )
)
