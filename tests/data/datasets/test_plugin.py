"""A data set of one's own: examples/cityscapes.py, read through the environment, on a generated miniature."""

import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

import starseg
from starseg.config import DataConfig, parse_config
from starseg.data.datasets import DATASETS, DatasetSpec, Split, data_root, find_dataset, load_plugins, open_dataset
from starseg.data.datasets.spec import register_dataset
from starseg.data.datasets.voc import VOC
from starseg.data.index import cache_dir, class_index
from starseg.data.labels import LabelMap
from starseg.data.samples import StepDataset
from starseg.engine.setup import resolve_config
from starseg.errors import UserError
from starseg.report.data_check import check_data, print_report
from starseg.tasks import TaskSequence
from starseg.utils.plugins import load_files

EXAMPLE = Path(__file__).parents[3] / "examples" / "cityscapes.py"
QUIET = Console(quiet=True)
# Ids in *_labelIds.png of the published trainIds 0 to 18.
LABEL_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
# Class ids of this spec by id on disk: 1 to 19, everything else ignored.
CLASS_IDS = np.full(256, 255)
CLASS_IDS[LABEL_IDS] = np.arange(1, 20)


@pytest.fixture(autouse=True)
def _plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example is registered for a test, and forgotten after it."""
    known = dict(DATASETS)
    load_plugins.cache_clear()
    monkeypatch.setenv("STARSEG_DATASETS", str(EXAMPLE))
    monkeypatch.delitem(sys.modules, EXAMPLE.stem, raising=False)
    yield
    sys.modules.pop(EXAMPLE.stem, None)
    DATASETS.clear()
    DATASETS.update(known)
    load_plugins.cache_clear()


@pytest.fixture
def miniature(tmp_path: Path) -> Path:
    """Cityscapes' layout with images of 64 px in two cities; each shows road, a second class and ignored ids."""
    root, rng = tmp_path / "cityscapes", np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for i in range(count):
            city = ("aachen", "ulm")[i % 2]
            ids = np.full((64, 64), 7, np.uint8)
            ids[:8] = rng.choice([0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30], (8, 64))
            ids[24:56, 8:40] = (11, 26, 33)[i % 3]
            image = (ids[..., None] * np.array([7, 5, 3]) + rng.integers(0, 20, (64, 64, 3))).astype(np.uint8)
            for folder, suffix, array in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_labelIds", ids)):
                path = root / folder / split / city / f"{city}_{i:06d}_000019_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


def _settings(root: Path, out: Path) -> dict:
    return {
        "out": str(out),
        "data": {"dataset": "cityscapes", "root": str(root), "crop": 64},
        "task": {"name": "tiny", "steps": [["road", "building"], ["car", "bicycle"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {
            **{"batch_size": 4, "warmup": 0.0, "precision": "32"},
            **{"base": {"epochs": 1, "lr": 0.01}, "later": {"epochs": 1, "lr": 0.001}},
        },
        "memory": {"size": 0},
        "star": {"pos_weight": 4},
    }


def _raw(split: Split) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in split.masks])


def test_the_example_is_short() -> None:
    lines = EXAMPLE.read_text().split("NAMES = {")
    beside_names = lines[0].split('"""')[2] + lines[1].split("}\n", 1)[1]
    assert sum(bool(line.strip()) for line in beside_names.splitlines()) <= 40


def test_the_page_s_code_is_the_example_s() -> None:
    page = (EXAMPLE.parents[1] / "docs" / "new-dataset.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2 and all(block in EXAMPLE.read_text() for block in blocks)
    fields = {f.name for f in dataclasses.fields(DatasetSpec)}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == fields


def test_the_layout_of_the_example(miniature: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="cityscapes", root=miniature))
    assert [len(split) for split in dataset.splits.values()] == [24, 8]
    assert dataset.train.ids[:2] == ("aachen_000000_000019", "aachen_000002_000019")
    assert len(dataset.names) == 20 and (dataset.names[1], dataset.names[19]) == ("road", "bicycle")
    assert data_root(DataConfig(dataset="cityscapes")) == Path("datasets/cityscapes")
    assert [len(step) for step in find_dataset("cityscapes").task(dataset.names, "13-1").steps] == [13, *[1] * 6]
    with pytest.raises(UserError, match=r"no leftImg8bit/train/<city>/.* as data\.root"):
        open_dataset(DataConfig(dataset="cityscapes", root=miniature / "gtFine"))


def test_index_and_samples_see_class_ids(miniature: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="cityscapes", root=miniature))
    pixels, class_ids = class_index(dataset, dataset.train), CLASS_IDS[_raw(dataset.train)]
    assert np.array_equal(pixels, [np.bincount(ids.ravel(), minlength=256) for ids in class_ids])
    task = find_dataset("cityscapes").task(dataset.names, steps=[["road", "building"], ["car"]])
    for step, split, fill in ((0, "train", 0), (1, "train", 0), (0, "test", 255), (1, "test", 255)):
        table = task.relabelling(step, split, fill)
        data = StepDataset(dataset.train, np.arange(24), dataset.labels.compose(table), None, None)
        assert np.array_equal([data[0, i].labels.numpy() for i in range(24)], table[class_ids])


def test_another_label_map_needs_no_other_scan(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(DataConfig(dataset="cityscapes", root=miniature))
    first, files = class_index(dataset, dataset.test), sorted(cache_dir().glob("index/*"))
    monkeypatch.setattr("starseg.data.index.scan_masks", lambda *_: pytest.fail("scanned again"))
    other = replace(dataset, labels=LabelMap.make(20, {7: 2, 11: 1, 26: 1, 33: 1}, set(range(34)) - {7, 11, 26, 33}))
    swapped = class_index(other, dataset.test)
    assert np.array_equal(swapped[:, 2], first[:, 1]) and np.array_equal(swapped[:, 1], first[:, [3, 14, 19]].sum(1))
    assert sorted(cache_dir().glob("index/*")) == files


def test_the_check_counts_classes_and_finds_unknown_ids(miniature: Path, tmp_path: Path) -> None:
    config = parse_config(_settings(miniature, tmp_path / "run"))
    report = check_data(config, QUIET)
    raw = _raw(report.data.dataset.train)
    assert report.as_data()["usable"]
    assert [report.published("training"), report.missing("test")] == [2975, 492]
    for step in report.as_data()["steps"]:
        for entry in step["classes"]:
            chosen = raw[report.data.positions(step["step"], "train")]
            assert entry["training"]["pixels"] == (CLASS_IDS[chosen] == entry["id"]).sum()
    wrong = report.data.dataset.test.masks[3]
    Image.fromarray(np.full((64, 64), 40, np.uint8)).save(wrong)
    report = check_data(config, QUIET)
    reason = "ids [40] are no classes (7 to 8, 11 to 13, 17, 19 to 28, 31 to 33; 0 to 6, 9 to 10, 14 to 16, 18, "
    assert [(b.file, b.reason) for b in report.broken] == [(wrong, f"{reason}29 to 30, 255 ignored)")]
    with pytest.raises(UserError, match=rf"{wrong.name}: ids \[40\] are no classes .*; 1 of 8 masks hold such ids"):
        class_index(report.data.dataset, report.data.dataset.test)
    text = io.StringIO()
    print_report(report, Console(file=text, width=200))
    assert "https://www.cityscapes-dataset.com" in text.getvalue()


def test_star_trains_two_steps(miniature: Path, tmp_path: Path) -> None:
    run = starseg.train(parse_config(_settings(miniature, tmp_path / "run")), console=QUIET)
    steps = json.loads((run / "results.json").read_text())["steps"]
    assert [list(step["iou"])[1:] for step in steps] == [["road", "building"], ["road", "building", "car", "bicycle"]]
    info = json.loads((run / "step_1" / "model.json").read_text())
    assert (info["dataset"], info["test_fill"], info["dataset_ids"]) == ("cityscapes", 255, [0, 1, 3, 14, 19])


def test_a_run_without_a_recipe_names_the_keys_to_give(miniature: Path, tmp_path: Path) -> None:
    settings = _settings(miniature, tmp_path / "run")
    del settings["train"]["later"], settings["star"]
    with pytest.raises(
        UserError, match=r"give train\.later\.epochs, train\.later\.lr, star\.pos_weight, or .*recipe=voc"
    ):
        starseg.train(parse_config(settings), console=QUIET)
    assert not (tmp_path / "run").exists()
    resolved, _ = resolve_config(parse_config({**settings, "recipe": "voc"}))
    assert (resolved.train.later.epochs, resolved.method_section("star")["pos_weight"]) == (60, 4.0)


ON_DISK = st.lists(st.sampled_from([*range(34), 255]), min_size=1, max_size=64)


@given(ON_DISK, st.permutations(range(1, 20)), st.integers(1, 18), st.sampled_from([0, 255]), st.data())
def test_label_ids_and_train_ids_give_equal_training_ids(
    values: list[int], order: list[int], base: int, fill: int, data: st.DataObject
) -> None:
    task = TaskSequence("random", (tuple(order[:base]), tuple(order[base:])), tuple(map(str, range(20))))
    table = task.relabelling(data.draw(st.integers(0, 1)), data.draw(st.sampled_from(["train", "val", "test"])), fill)
    label_ids = np.array(values, np.uint8)
    train_ids = np.array([LABEL_IDS.index(v) if v in LABEL_IDS else 255 for v in values], np.uint8)
    from_labels = LabelMap.make(20, dict(zip(LABEL_IDS, range(1, 20), strict=True)), set(range(34)) - set(LABEL_IDS))
    from_train = LabelMap.make(20, {i: i + 1 for i in range(19)})
    got, same = from_labels.compose(table)[label_ids], from_train.compose(table)[train_ids]
    assert np.array_equal(got, same) and np.array_equal(got, table[CLASS_IDS[label_ids]])
    counts = [
        labels.class_pixels(np.bincount(ids, minlength=256))
        for labels, ids in ((from_labels, label_ids), (from_train, train_ids))
    ]
    assert np.array_equal(*counts) and not from_labels.unknown(np.bincount(label_ids, minlength=256)).any()


def test_ids_that_are_class_ids_cost_nothing() -> None:
    labels, table, pixels = LabelMap.make(21), np.arange(256, dtype=np.uint8), np.ones((3, 256), np.int32)
    assert labels.compose(table) is table and labels.class_pixels(pixels) is pixels
    assert str(labels) == "0 to 20, 255 ignored"
    assert np.flatnonzero(labels.unknown(pixels[0])).tolist() == list(range(21, 255))
    ignoring = LabelMap.make(21, ignored=[3])
    assert (
        ignoring.compose(table)[2:5].tolist() == [2, 255, 4] and ignoring.class_pixels(pixels)[0, [3, 255]].sum() == 2
    )


def test_an_unknown_data_set_is_refused_with_the_known_ones(miniature: Path, tmp_path: Path) -> None:
    settings = _settings(miniature, tmp_path / "run")
    settings["data"]["dataset"] = "nosuch"
    known = "ade, ade_full, camvid, city, city_domain, cityscapes, coco_stuff10k, coco_stuff164k, folder"
    known += ", pascal_context, voc"
    message = f"data.dataset: unknown data set 'nosuch'; known: {known}; .* STARSEG_DATASETS"
    for action in (check_data, lambda config, console: starseg.train(config, console=console)):
        with pytest.raises(UserError, match=message):
            action(parse_config(settings), QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "voc"}, "data set 'voc' is registered already: PASCAL VOC 2012"),
        ({"background": False}, "without a background, test_fill must be 255"),
        ({"test_fill": 1}, "test_fill must be 0 or 255, got 1"),
        ({"label_map": {256: 1}}, r"ids on disk must be 0 to 255, got \[256\]"),
        ({"label_map": {7: 21}}, r"label_map gives class ids \[21\], names has 0 to 20"),
        ({"label_map": {7: 1, 8: 2}, "ignored": [8]}, r"gives classes to the ignored ids \[8\]"),
    ],
)
def test_wrong_specs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_dataset(replace(VOC, **{"key": "own", **change}))


def test_a_setting_that_a_data_set_lacks() -> None:
    spec = DatasetSpec(key="own", title="Own", root=Path(), open=VOC.open, names=VOC.names, settings=("overlap",))
    with pytest.raises(UserError, match=r"task\.setting: Own has no setting 'disjoint'; give one of: overlap"):
        spec.task(spec.names, "joint", setting="disjoint")


def test_a_file_named_twice_is_imported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_dataset("cityscapes")
    monkeypatch.setenv("STARSEG_METHODS", f"{EXAMPLE}:{EXAMPLE}")
    load_files("STARSEG_METHODS")
    assert find_dataset("cityscapes") is spec


def test_a_plug_in_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own_data.py"
    monkeypatch.setenv("STARSEG_DATASETS", str(path))
    with pytest.raises(UserError, match=r"STARSEG_DATASETS: .*own_data\.py is no Python file"):
        find_dataset("voc")
    path.write_text("from starseg.data.datasets import DatasetSpec\nDatasetSpec(key='own')")
    with pytest.raises(UserError, match=r"STARSEG_DATASETS: .*own_data\.py cannot be loaded: TypeError: .*'title'"):
        find_dataset("own")
