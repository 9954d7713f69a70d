"""ADE20K: its layout, class table and ids, and a run on it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

import starseg
from starseg.config import DataConfig, parse_config
from starseg.data.datasets import Split, open_dataset
from starseg.data.datasets.ade20k import ADE, open_ade, read_names, read_split
from starseg.data.index import scan_masks
from starseg.data.samples import StepDataset
from starseg.errors import UserError


@pytest.fixture
def ade_copy(ade_shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ade_shapes, tmp_path / "ADE"))


def _open(root: Path):
    return open_dataset(DataConfig(dataset="ade", root=root))


def test_the_layout(ade_shapes: Path) -> None:
    dataset = _open(ade_shapes)
    assert (dataset.key, dataset.test_fill, len(dataset.names)) == ("ade", 255, 151)
    assert dataset.names[:3] == ("other", "disc", "square") and dataset.names[6] == "thing 6"
    assert dataset.names[-2:] == ("screen, silver screen", "screen, of a telephone")
    assert (len(dataset.train), len(dataset.test)) == (48, 12)
    assert dataset.train.ids[:2] == ("train_00000", "train_00001") and dataset.test.ids[-1] == "val_00011"
    for split in (dataset.train, dataset.test):
        assert [p.stem for p in split.images] == [p.stem for p in split.masks] == list(split.ids)
    assert [len(step) for step in ADE.task(dataset.names, "100-10").steps] == [100, 10, 10, 10, 10, 10]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("objectInfo150.txt", r"objectInfo150\.txt: cannot read this list .*; data\.root must be .* ADE20K layout"),
        ("images/training", r"images/training: this folder is missing; data\.root must be .*ADEChallengeData2016\.zip"),
        ("annotations/validation", r"annotations/validation: this folder is missing"),
        (
            "annotations/training/train_00003.png",
            r"1 of 48 training masks are missing, the first is .*train_00003\.png",
        ),
    ],
)
def test_missing_parts_are_named(ade_copy: Path, missing: str, message: str) -> None:
    path = ade_copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=message):
        _open(ade_copy)


def test_files_of_macos_are_no_images(ade_copy: Path) -> None:
    expected = _open(ade_copy)
    for split in ("training", "validation"):
        for image in list((ade_copy / "images" / split).iterdir()):
            image.with_name(f"._{image.name}").write_bytes(b"\0\5\26\7")
    assert _open(ade_copy) == expected


def test_a_folder_without_images(ade_copy: Path) -> None:
    for image in (ade_copy / "images" / "validation").iterdir():
        image.rename(image.with_suffix(".png"))
    with pytest.raises(UserError, match=r"images/validation: expected \*\.jpg images, found none"):
        _open(ade_copy)


@pytest.mark.parametrize("given", ["ADE20K", "ADE20K/.."])
def test_the_unpacked_zip_is_found(ade_copy: Path, given: str) -> None:
    unpacked = ade_copy.rename(ade_copy.parent / "ADEChallengeData2016")
    (unpacked.parent / "ADE20K").mkdir()
    with pytest.raises(UserError, match=r"the data seem to lie in (.*ADEChallengeData2016): give data\.root=\1"):
        _open(unpacked.parent / given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], "expected a tab-separated table with the header .*, got ''"),
        (lambda rows: rows[1:], "expected a tab-separated table"),
        (lambda rows: [row.replace("\t", " ") for row in rows], "expected a tab-separated table"),
        (lambda rows: rows[:-1], "expected 150 classes, got 149"),
        (lambda rows: rows[:7] + rows[8:], "expected row 7 to be '7 Ratio Train Val Name', got .'8'"),
        (lambda rows: [*rows[:3], "3\t0.01\t9\t3\t", *rows[4:]], "expected row 3"),
    ],
)
def test_a_wrong_class_table_is_explained(ade_copy: Path, change, message: str) -> None:
    table = ade_copy / "objectInfo150.txt"
    table.write_text("\n".join(change(table.read_text().splitlines())))
    with pytest.raises(UserError, match=rf"objectInfo150\.txt: {message}"):
        read_names(ade_copy)


def _run(root: Path, out: Path) -> dict:
    return {
        "out": str(out),
        "data": {"dataset": "ade", "root": str(root), "crop": 64},
        "task": {"name": "tiny", "steps": [["disc", 2, 3], ["hexagon"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {"batch_size": 4, "base": {"epochs": 1}, "later": {"epochs": 1}, "precision": "32"},
    }


@pytest.mark.parametrize("method", ["star", "star-m"])
def test_star_trains_on_it_with_its_own_defaults(ade_shapes: Path, tmp_path: Path, method: str) -> None:
    settings = {**_run(ade_shapes, tmp_path / "run"), "method": method}
    run = starseg.train(parse_config(settings), console=Console(quiet=True))
    saved = yaml.safe_load((run / "config.yaml").read_text())["train"]
    assert (saved["warmup"], saved["base"]["lr"], saved["later"]["lr"]) == (0.2, 2.5e-3, 2.5e-4)
    info = json.loads((run / "step_1" / "model.json").read_text())
    assert (info["dataset"], info["test_fill"], info["dataset_ids"]) == ("ade", 255, [0, 1, 2, 3, 4])
    steps = json.loads((run / "results.json").read_text())["steps"]
    assert list(steps[-1]["iou"]) == ["other", "disc", "square", "triangle", "hexagon"]


def test_later_classes_are_ignored_in_tests(ade_shapes: Path) -> None:
    dataset = open_ade(ade_shapes)
    task = ADE.task(dataset.names, "tiny", [["disc", 2, 3], ["hexagon"], ["heart"]])
    table = task.relabelling(0, "test", dataset.test_fill)
    assert table[:7].tolist() == [0, 1, 2, 3, 255, 255, 255] and table[255] == 255


def test_ids_above_150_stop_a_run_before_it_starts(ade_copy: Path, tmp_path: Path) -> None:
    for number in (3, 7):
        mask = np.full((64, 64), 150, np.uint8)
        mask[0, 0], mask[0, 1], mask[0, 2] = 151, 200, 255
        Image.fromarray(mask).save(ade_copy / "annotations" / "validation" / f"val_{number:05d}.png")
    message = r"val_00003\.png: ids \[151, 200\] are no classes .* \(0 to 150, .*\); 2 of 12 masks hold such ids"
    for _cached in (False, True):
        with pytest.raises(UserError, match=message):
            starseg.train(parse_config(_run(ade_copy, tmp_path / "run")), console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_the_real_sample(ade_sample: Path) -> None:
    names = read_names(ade_sample)
    assert len(set(names)) == 151 and names[:5] == ("other", "wall", "building", "sky", "floor")
    split = read_split(ade_sample, "validation")
    assert isinstance(split, Split) and split.ids == tuple(f"ADE_val_{i:08d}" for i in (1, 2, 3))
    pixels = scan_masks(split.masks)
    assert pixels[:, 151:].sum() == 0 and pixels[:, 1:151].sum() > 0
    table = ADE.task(names, "100-50").relabelling(0, "test", 255)
    sample = StepDataset(split, np.arange(3), table, None, None)[0, 0]
    assert sample.images.shape == (3, 512, 683) and sample.labels.shape == (512, 683)
    with pytest.raises(UserError, match=r"images/training: this folder is missing; data\.root must be"):
        open_ade(ade_sample)
