"""COCO-Stuff and Pascal Context: layouts, label maps, tasks, and two steps, on generated miniatures."""

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
from starseg.report.data_check import check_data, print_report
from starseg.utils.files import read_json

QUIET = Console(quiet=True)
# Ids in the masks of three classes and of unlabelled pixels.
IDS = {
    "coco_stuff164k": {"person": 0, "street": 148, "wood": 181, "unlabelled": 255},
    "converted": {"person": 0, "street": 137, "wood": 170, "unlabelled": 255},
    "coco_stuff10k": {"person": 1, "street": 138, "wood": 171, "unlabelled": 0},
    "pascal_context": {"person": 37, "street": 41, "wood": 59, "unlabelled": 0},
}
CLASS_IDS = {"coco": (1, 138, 171), "pascal": (37, 41, 59)}


def _folders(kind: str, split: str) -> tuple[Path, Path, str]:
    """Return the folders of images and masks and the suffix of masks."""
    if kind == "pascal_context":
        return Path("JPEGImages"), Path("SegmentationClassContext"), ".png"
    year = 2014 if kind == "coco_stuff10k" else 2017
    name = f"train{year}" if split == "train" else f"{'test' if year == 2014 else 'val'}{year}"
    return (
        Path("images") / name,
        Path("annotations") / name,
        ".png" if kind == "coco_stuff164k" else "_labelTrainIds.png",
    )


def _write(root: Path, kind: str) -> Path:
    """Write a miniature of images of 48 x 40 pixels; each shows person, street or wood beside unlabelled pixels."""
    rng = np.random.default_rng(0)
    values = list(IDS[kind].values())
    for split, count in (("train", 9), ("val", 4)):
        images, masks, suffix = _folders(kind, split)
        stems = [f"{split}_{i:012d}" for i in range(count)]
        for number, stem in enumerate(stems):
            mask = np.full((40, 48), values[3], np.uint8)
            mask[8:32] = values[number % 3]
            mask[:6] = values[(number + 1) % 3]
            photo = (mask[..., None] // 2 * np.array([1, 2, 1]) % 236 + rng.integers(0, 20, (40, 48, 3))).astype(
                np.uint8
            )
            for folder, name, array in ((images, f"{stem}.jpg", photo), (masks, f"{stem}{suffix}", mask)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / name)
        if kind == "pascal_context":
            lists = root / "ImageSets" / "SegmentationContext"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text("\n".join(stems) + "\n")
    return root


def _key(kind: str) -> str:
    return "coco_stuff164k" if kind == "converted" else kind


def _tree(root: Path, kind: str) -> dict:
    return {
        "out": str(root.parent / "run"),
        "data": {"dataset": _key(kind), "root": str(root), "crop": 32},
        "task": {"name": "tiny", "steps": [["person", "road"], ["wood"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {
            **{"batch_size": 2, "warmup": 0.0, "precision": "32"},
            **{"base": {"epochs": 1, "lr": 1e-4}, "later": {"epochs": 1, "lr": 1e-5}},
        },
    }


@pytest.mark.parametrize("kind", IDS)
def test_labels(kind: str, tmp_path: Path) -> None:
    dataset = open_dataset(DataConfig(dataset=_key(kind), root=_write(tmp_path / "data", kind)))
    assert [len(split) for split in dataset.splits.values()] == [9, 4] and not dataset.background
    pixels, masks = class_index(dataset, dataset.train), np.stack([read_mask(path) for path in dataset.train.masks])
    classes = CLASS_IDS[kind.split("_")[0] if kind != "converted" else "coco"]
    assert [dataset.names[c] for c in classes] == ["person", "road", "wood"]
    for class_id, value in zip(classes, IDS[kind].values(), strict=False):
        np.testing.assert_array_equal(pixels[:, class_id], (masks == value).sum((1, 2)))
        assert dataset.mask_ids[class_id] == value
    np.testing.assert_array_equal(pixels[:, 255], (masks == IDS[kind]["unlabelled"]).sum((1, 2)))
    assert pixels.sum() == masks.size


@pytest.mark.parametrize("kind", IDS)
def test_the_data_check_and_two_steps(kind: str, tmp_path: Path) -> None:
    root, console = _write(tmp_path / "data", kind), Console(record=True, width=160)
    config = parse_config(_tree(root, kind))
    report = check_data(config, QUIET)
    print_report(report, console)
    published = DATASETS[_key(kind)].images
    text = console.export_text()
    assert not report.broken and not report.task_problem
    assert f"training: 9 images; published: {published['training']:,}" in text
    assert f"test: 4 images; published: {published['test']:,}" in text
    run = starseg.train(config, console=QUIET)
    results = read_json(run / "results.json")
    assert list(results["steps"][1]["iou"]) == ["person", "road", "wood"]
    assert any("hyper-parameters of data set" in note for note in results["run"]["notes"])
    photo = next((root / _folders(kind, "val")[0]).glob("val_*.jpg"))
    mask = starseg.load(run / "step_1").predict(photo)
    assert set(np.unique(mask)) <= {*IDS[kind].values()} - {IDS[kind]["unlabelled"]}


def test_ids_of_removed_categories_are_unknown(tmp_path: Path) -> None:
    """No pixel of the published masks has one of the eleven ids of COCO categories without objects."""
    spec = DATASETS["coco_stuff164k"]
    assert spec.label_map is not None and len(spec.label_map) == len(spec.names) == 171
    assert {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90} == set(range(182)) - spec.label_map.keys()
    root = _write(tmp_path / "data", "coco_stuff164k")
    file = next((root / "annotations" / "train2017").glob("*.png"))
    Image.fromarray(np.full((40, 48), 11, np.uint8)).save(file)
    report = check_data(parse_config(_tree(root, "coco_stuff164k")), QUIET)
    assert [(b.file, b.reason.split(" (")[0]) for b in report.broken] == [(file, "ids [11] are no classes")]


def test_tasks() -> None:
    coco, context = DATASETS["coco_stuff164k"], DATASETS["pascal_context"]
    old, new = coco.all_tasks["156-15"]
    assert (len(old), len(new)) == (156, 15) and sorted(old + new) == list(range(1, 172))
    assert [coco.names[c - 1] for c in new[:3]] == ["frisbee", "skateboard", "cardboard"]
    assert coco.all_tasks == DATASETS["coco_stuff10k"].all_tasks
    assert {n: [len(s) for s in steps] for n, steps in context.all_tasks.items()} == {
        "joint": [59],
        **{f"{59 - n}-{n}": [59 - n, n] for n in (2, 4, 6, 8, 10)},
    }
    assert [context.names[c - 1] for c in context.all_tasks["55-4"][1]] == ["cow", "motorbike", "sofa", "cat"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("coco_stuff164k", r"no images/train2017/\*\.jpg; data\.root must be a folder with images"),
        ("coco_stuff10k", r"no images/train2014/\*\.jpg; .*mmsegmentation's coco_stuff10k\.py"),
        ("pascal_context", r"train\.txt: cannot read this list .*data\.root must be the folder VOC2010"),
    ],
)
def test_another_layout_is_refused(key: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(DataConfig(dataset=key, root=tmp_path))
