"""Cityscapes as in the journal version: layout, lists, class ids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import starseg
from starseg.config import DataConfig, parse_config
from starseg.data.datasets import DATASETS, open_dataset
from starseg.data.images import read_mask
from starseg.data.index import class_index
from starseg.errors import UserError
from starseg.utils.files import read_json

Write = Callable[..., Path]


@pytest.fixture
def city(tmp_path: Path, write_city: Write) -> Path:
    return write_city(tmp_path / "CityScapes", train=6, val=2)


def test_folders_without_lists(city: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="city", root=city))
    assert [len(split) for split in dataset.splits.values()] == [6, 2]
    assert dataset.train.ids[:2] == ("aachen_000000_000019", "aachen_000002_000019")
    assert (dataset.names[0], dataset.names[1], dataset.names[19]) == ("background", "road", "bicycle")


def test_published_lists_name_the_files(city: Path) -> None:
    name = "train/ulm/ulm_000001_000019"
    line = f"leftImg8bit/{name}_leftImg8bit.png gtFine/{name}_gtFine_labelIds.png"
    (city / "fine_train.txt").write_text(f"{line}\n")
    assert open_dataset(DataConfig(dataset="city", root=city)).train.ids == ("ulm_000001_000019",)
    (city / "fine_train.txt").write_text(f"{line}\nulm\n")
    with pytest.raises(UserError, match=r"fine_train\.txt, line 2: expected 'leftImg8bit"):
        open_dataset(DataConfig(dataset="city", root=city))


def test_void_is_background(city: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="city", root=city))
    pixels = class_index(dataset, dataset.train)
    raw = np.stack([np.asarray(Image.open(path)) for path in dataset.train.masks])
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    expected = [(~np.isin(raw, ids)).sum(), *((raw == i).sum() for i in ids)]
    assert pixels.sum(0)[:20].tolist() == expected


def _to_train_ids(city: Path) -> None:
    """Replace the files of labelIds by those that Cityscapes' createTrainIdLabelImgs.py writes."""
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    table = np.full(256, 255, np.uint8)
    table[ids] = np.arange(19)
    for path in city.glob("gtFine/*/*/*_labelIds.png"):
        Image.fromarray(table[np.asarray(Image.open(path))]).save(
            path.with_name(path.name.replace("_labelIds", "_labelTrainIds"))
        )
        path.unlink()


@pytest.mark.parametrize("key", ["city", "city_domain"])
@pytest.mark.parametrize("seed", range(5))
def test_train_ids_give_the_labels_of_label_ids(key: str, seed: int, city: Path) -> None:
    rng = np.random.default_rng(seed)
    for path in city.glob("gtFine/*/*/*_labelIds.png"):
        Image.fromarray(rng.integers(0, 34, (64, 64), np.uint8)).save(path)
    order = [int(c) for c in rng.permutation(19) + 1]
    base = int(rng.integers(1, 18))
    task = DATASETS["city"].task(DATASETS["city"].names, "t", [order[:base], order[base:]])

    def labels() -> list[np.ndarray]:
        dataset = open_dataset(DataConfig(dataset=key, root=city))
        found = [class_index(dataset, split) for split in dataset.splits.values()]
        for step, kind in ((0, "train"), (1, "train"), (0, "test"), (1, "test")):
            table = dataset.labels.compose(task.relabelling(step, kind, dataset.test_fill))  # type: ignore[arg-type]
            found += [table[read_mask(path)] for path in dataset.train.masks + dataset.test.masks]
        return found

    expected = labels()
    _to_train_ids(city)
    for found, label in zip(labels(), expected, strict=True):
        np.testing.assert_array_equal(found, label)


def test_masks_of_two_kinds_are_refused(city: Path) -> None:
    name = "train/ulm/ulm_000001_000019"
    (city / "fine_train.txt").write_text(f"leftImg8bit/{name}_leftImg8bit.png gtFine/{name}_gtFine_labelTrainIds.png\n")
    with pytest.raises(UserError, match=r"some masks are \*_gtFine_labelIds\.png, others \*_gtFine_labelTrainIds\.png"):
        open_dataset(DataConfig(dataset="city", root=city))


def test_two_steps_on_train_ids(city: Path) -> None:
    _to_train_ids(city)
    tree = {
        **{"method": "star-basic", "out": str(city.parent / "run")},
        "data": {"dataset": "city", "root": str(city), "crop": 64},
        "task": {"name": "tiny", "steps": [["road", "building"], ["car", "bicycle"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {
            **{"batch_size": 2, "warmup": 0.0, "precision": "32"},
            **{"base": {"epochs": 1, "lr": 1e-3}, "later": {"epochs": 1, "lr": 1e-4}},
        },
    }
    run = starseg.train(parse_config(tree), console=Console(quiet=True))
    assert list(read_json(run / "results.json")["steps"][1]["iou"]) == [
        "background",
        "road",
        "building",
        "car",
        "bicycle",
    ]


def test_tasks() -> None:
    assert [len(step) for step in DATASETS["city"].all_tasks["10-1"]] == [10, *[1] * 9]
    tasks = DATASETS["city"].tasks
    assert {name: [len(step) for step in steps] for name, steps in tasks.items()} == {
        "joint": [19],
        "14-1": [14, 1, 1, 1, 1, 1],
        "14-5": [14, 5],
        "13-1": [13, 1, 1, 1, 1, 1, 1],
        "13-6": [13, 6],
    }


def test_another_layout_is_refused(city: Path) -> None:
    with pytest.raises(UserError, match=r"no leftImg8bit/train/<city>/.*docs/datasets\.md"):
        open_dataset(DataConfig(dataset="city", root=city / "gtFine"))
