"""Cityscapes as in the journal version: layout, lists, class ids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starseg.config import DataConfig
from starseg.data.datasets import DATASETS, open_dataset
from starseg.data.index import class_index
from starseg.errors import UserError

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


def test_tasks() -> None:
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
