"""A data set without a background in the whole system: specs, labels, training with every kind of method, scores."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import starseg
from starseg.config import DataConfig, parse_config
from starseg.data.datasets import DATASETS, Dataset, DatasetSpec, Split, find_dataset, open_dataset
from starseg.data.datasets.spec import register_dataset
from starseg.data.datasets.voc import open_voc
from starseg.data.images import read_mask
from starseg.data.index import class_index
from starseg.engine.checkpoint import load_info
from starseg.engine.metrics import summarize
from starseg.methods import METHODS
from starseg.report.data_check import check_data
from starseg.report.page import write_report
from starseg.utils.files import read_json

QUIET = Console(quiet=True)
ALL = sorted(METHODS)
NAMES = ("ground", "disc", "square", "triangle", "hexagon", "heart")


def _open(root: Path) -> Dataset:
    voc = open_voc(root)
    return find_dataset("scene").dataset(root, voc.train, voc.test)


@pytest.fixture(autouse=True)
def scene() -> Iterator[DatasetSpec]:
    """The synthetic data set, in whose masks 0 is the class "ground", and 5 ("heart") is ignored."""
    known = dict(DATASETS)
    spec = DatasetSpec(
        key="scene",
        title="Scene",
        root=Path(),
        open=_open,
        names=NAMES[:5],
        background=False,
        test_fill=255,
        ignored=(5,),
    )
    yield register_dataset(spec)
    DATASETS.clear()
    DATASETS.update(known)


def _run(shapes: Path, out: Path, method: str) -> Path:
    tree = {
        "method": method,
        "out": str(out),
        "data": {"dataset": "scene", "root": str(shapes), "crop": 64},
        "task": {"name": "tiny", "steps": [["ground", "disc", "square"], ["triangle"], ["hexagon"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "recipe": "voc",
        METHODS[method].section: dict(METHODS[method].contract_options),
        "train": {
            **{"batch_size": 4, "warmup": 0.0, "precision": "32"},
            **{"base": {"epochs": 1, "lr": 0.01}, "later": {"epochs": 1, "lr": 0.001}},
        },
    }
    return starseg.train(parse_config(tree), console=QUIET)


def test_labels(shapes: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="scene", root=shapes))
    assert dataset.names == ("background", *NAMES[:5]) and not dataset.background
    assert dataset.mask_ids == {0: 255, **{i: i - 1 for i in range(1, 6)}}
    pixels = class_index(dataset, dataset.train)
    masks = np.stack([read_mask(path) for path in dataset.train.masks])
    assert not pixels[:, 0].any()
    for value in range(5):
        np.testing.assert_array_equal(pixels[:, value + 1], (masks == value).sum((1, 2)))
    np.testing.assert_array_equal(pixels[:, 255], ((masks == 5) | (masks == 255)).sum((1, 2)))
    task = find_dataset("scene").task(dataset.names, "tiny", [["ground"], ["disc"]])
    table = dataset.labels.compose(task.relabelling(1, "test", dataset.test_fill))
    assert table[:6].tolist() == [1, 2, 255, 255, 255, 255]
    table = dataset.labels.compose(task.relabelling(1, "train"))
    assert table[:6].tolist() == [0, 2, 0, 0, 0, 255]


@pytest.mark.parametrize(
    "method", [m if m in ("star", "finetune", "mib", "ssul") else pytest.param(m, marks=pytest.mark.slow) for m in ALL]
)
def test_every_method(shapes: Path, tmp_path: Path, method: str) -> None:
    run = _run(shapes, tmp_path / method, method)
    results = read_json(run / "results.json")
    assert results["run"]["background"] is False
    last = len(results["steps"]) - 1
    assert last == (0 if method == "joint" else 2)
    for step in results["steps"]:
        learnt = [*NAMES[:3], "triangle", "hexagon"][: 5 if method == "joint" else 3 + step["step"]]
        assert list(step["iou"]) == learnt
        confusion = np.array(read_json(run / f"step_{step['step']}" / "metrics.json")["confusion"])
        assert not confusion[0].any() and not confusion[:, 0].any() and confusion.any()
        old = [step["iou"][name] for name in NAMES[:3] if step["iou"][name] is not None]
        assert np.isclose(step["miou"]["old"], np.mean(old))
    info = load_info(run / f"step_{last}")
    assert not info.background and info.dataset_ids == [0, 1, 2, 3, 4, 5] and info.mask_ids == [255, 0, 1, 2, 3, 4]
    predicted = starseg.load(run / f"step_{last}").predict(
        open_dataset(DataConfig(dataset="scene", root=shapes)).test.images
    )
    assert {int(v) for mask in predicted for v in np.unique(mask)} <= set(range(5))
    write_report([run], tmp_path / "report", QUIET)


def test_the_data_check(shapes: Path, tmp_path: Path) -> None:
    tree = {"out": str(tmp_path), "data": {"dataset": "scene", "root": str(shapes)}, "task": {"name": "joint"}}
    report = check_data(parse_config(tree | {"recipe": "voc"}), QUIET)
    assert not report.broken


def test_scores_without_a_background() -> None:
    matrix = np.array([[0, 0, 5], [0, 6, 2], [0, 1, 7]])
    figures = summarize(matrix, ["background", "sky", "car"], 1, background=False)
    assert figures["iou"] == {"sky": pytest.approx(100 * 6 / 9), "car": pytest.approx(100 * 7 / 15)}
    assert figures["miou"]["old"] == figures["iou"]["sky"] and figures["miou"]["new"] == figures["iou"]["car"]
    assert figures["pixel_accuracy"]["all"] == pytest.approx(100 * 13 / 16)
    assert "background" in summarize(matrix, ["background", "sky", "car"], 1)["iou"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_fill": 0}, "without a background, test_fill must be 255"),
        ({"label_map": {7: 0}}, r"label_map gives class ids \[0\], names has 1 to 5"),
        ({"label_map": {7: 6}}, r"label_map gives class ids \[6\], names has 1 to 5"),
    ],
)
def test_specs_that_are_refused(scene: DatasetSpec, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(scene, **change)


def test_masks_have_the_ids_on_disk(scene: DatasetSpec, tmp_path: Path) -> None:
    spec = replace(scene, label_map={0: 1, 7: 2, 8: 3, 9: 3, 11: 4, 12: 5})
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    files = Split((tmp_path / "a.png",), (tmp_path / "a.png",), ("a",))
    dataset = spec.dataset(tmp_path, files, files)
    assert dataset.mask_ids == {0: 255, 1: 0, 2: 7, 3: 8, 4: 11, 5: 12}
    assert class_index(dataset, files)[0, 3] == 16
