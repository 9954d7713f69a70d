"""The layout of CamVid, on a generated miniature."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import starseg
from starseg.config import DataConfig, parse_config
from starseg.data.datasets import open_dataset
from starseg.data.images import read_mask
from starseg.data.index import class_index
from starseg.errors import UserError
from starseg.report.data_check import check_data, print_report
from starseg.utils.files import read_json

QUIET = Console(quiet=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images of 36 x 48 pixels; each shows every class and void."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        for number in range(count):
            mask = np.repeat(rng.permutation(12).astype(np.uint8), 3)[:, None].repeat(48, 1)
            photo = (20 * mask[..., None] + rng.integers(0, 20, (*mask.shape, 3))).astype(np.uint8)
            for folder, array in ((split, photo), (f"{split}annot", mask)):
                (tmp_path / "CamVid" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / "CamVid" / folder / f"0001TP_{number:06d}.png")
    return tmp_path / "CamVid"


def _tree(root: Path) -> dict:
    return {
        "out": str(root.parent / "run"),
        "recipe": "voc",
        "data": {"dataset": "camvid", "root": str(root), "crop": 32},
        "task": {"name": "tiny", "steps": [["sky", "building", "road"], ["car", "bicyclist"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {
            **{"batch_size": 2, "warmup": 0.0, "precision": "32"},
            **{"base": {"epochs": 1, "lr": 0.01}, "later": {"epochs": 1, "lr": 0.001}},
        },
    }


def test_the_layout(root: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="camvid", root=root))
    assert [len(split) for split in dataset.splits.values()] == [8, 4] and not dataset.background
    assert (dataset.names[1], dataset.names[11], len(dataset.names)) == ("sky", "bicyclist", 12)
    pixels, masks = class_index(dataset, dataset.train), np.stack([read_mask(path) for path in dataset.train.masks])
    for value in range(11):
        np.testing.assert_array_equal(pixels[:, value + 1], (masks == value).sum((1, 2)))
    np.testing.assert_array_equal(pixels[:, 255], (masks == 11).sum((1, 2)))
    with pytest.raises(UserError, match=r"no train/\*\.png; data\.root must be the folder CamVid"):
        open_dataset(DataConfig(dataset="camvid", root=root / "train"))


def test_the_data_check(root: Path) -> None:
    console = Console(record=True, width=160)
    report = check_data(parse_config(_tree(root)), QUIET)
    print_report(report, console)
    text = console.export_text()
    assert (
        not report.broken and "training: 8 images; published: 367" in text and "test: 4 images; published: 233" in text
    )


def test_two_steps(root: Path) -> None:
    run = starseg.train(parse_config(_tree(root)), console=QUIET)
    assert list(read_json(run / "results.json")["steps"][1]["iou"]) == ["sky", "building", "road", "car", "bicyclist"]
    mask = starseg.load(run / "step_1").predict(root / "test" / "0001TP_000000.png")
    assert set(np.unique(mask)) <= {0, 1, 3, 8, 10}
