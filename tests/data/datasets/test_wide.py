"""More than 254 classes: 16-bit masks and int32 labels, from ADE20K-Full's layout to predicted masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import starseg
from starseg.config import DataConfig, parse_config
from starseg.contract import MethodHarness
from starseg.data.cache import ImageCache, decoded_shapes
from starseg.data.datasets import DATASETS, open_dataset
from starseg.data.images import read_mask
from starseg.data.index import class_index
from starseg.data.labels import LabelMap
from starseg.data.samples import Batch, StepDataset
from starseg.engine.checkpoint import load_info, load_model
from starseg.engine.evaluate import evaluate_model
from starseg.errors import UserError
from starseg.inference.files import predict_files
from starseg.methods import METHODS
from starseg.ops.labels import ignored_id, signed_ids
from starseg.report.data_check import check_data, print_report
from starseg.report.page import write_report
from starseg.tasks import WIDE_IGNORE, TaskSequence
from starseg.utils.files import read_json

QUIET = Console(quiet=True)
# Ids in the masks: the first class, those around 255, the last one.
VALUES = (0, 254, 255, 256, 846)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images of 40 x 48 pixels; each shows two of the five values, and pixels without a class."""
    rng = np.random.default_rng(0)
    for split, count in (("training", 10), ("validation", 5)):
        for number in range(count):
            mask = np.full((40, 48), WIDE_IGNORE, np.uint16)
            mask[:20], mask[20:36] = VALUES[number % 5], VALUES[(number + 1) % 5]
            photo = (mask[..., None] % 200 + rng.integers(0, 50, (40, 48, 3))).astype(np.uint8)
            for kind, suffix, array in (("images", "jpg", photo), ("annotations", "tif", mask)):
                folder = tmp_path / "ADE" / f"{kind}_detectron2" / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"{split}_{number:08d}.{suffix}")
    return tmp_path / "ADE"


def _tree(root: Path, method: str = "star") -> dict:
    return {
        "method": method,
        "out": str(root.parent / method),
        "data": {"dataset": "ade_full", "root": str(root), "crop": 32},
        "task": {"name": "tiny", "steps": [[1, 255, 256], [257], [847]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        METHODS[method].section: dict(METHODS[method].contract_options),
        "train": {
            **{"batch_size": 2, "warmup": 0.0, "precision": "32"},
            **{"base": {"epochs": 1, "lr": 1e-4}, "later": {"epochs": 1, "lr": 1e-5}},
        },
    }


def test_masks_and_labels(root: Path) -> None:
    dataset = open_dataset(DataConfig(dataset="ade_full", root=root))
    masks = np.stack([read_mask(path, wide=True) for path in dataset.train.masks])
    assert dataset.labels.wide and masks.dtype == np.uint16
    pixels = class_index(dataset, dataset.train)
    for value in VALUES:
        np.testing.assert_array_equal(pixels[:, value + 1], (masks == value).sum((1, 2)))
        assert dataset.mask_ids[value + 1] == value
    assert pixels.sum() == (masks != WIDE_IGNORE).sum() and dataset.mask_ids[0] == WIDE_IGNORE
    task = DATASETS["ade_full"].task(dataset.names, "t", [[847, 1], [256, 255]])
    for step, kind, shown in ((1, "train", {255: 3, 254: 4}), (1, "test", {846: 1, 0: 2, 255: 3, 254: 4})):
        table = dataset.labels.compose(task.relabelling(step, kind, 0 if kind == "train" else 255))  # type: ignore[arg-type]
        rest = WIDE_IGNORE if kind == "test" else 0
        for value in VALUES:
            assert table[value] == shown.get(value, rest)
        assert table[WIDE_IGNORE] == WIDE_IGNORE and table.dtype == np.int32
        samples = StepDataset(dataset.train, np.arange(10), table, None, None)
        for i, mask in enumerate(masks):
            np.testing.assert_array_equal(samples[0, i].labels.numpy(), table[mask])


def test_the_cache_keeps_16_bits(root: Path) -> None:
    split = open_dataset(DataConfig(dataset="ade_full", root=root)).train
    cache = ImageCache(decoded_shapes(split, wide=True))
    for path in split.masks * 2:
        np.testing.assert_array_equal(cache.mask(path, wide=True), read_mask(path, wide=True))


def test_the_data_check(root: Path) -> None:
    config, console = parse_config(_tree(root)), Console(record=True, width=160)
    report = check_data(config, QUIET)
    print_report(report, console)
    assert not report.broken and not report.task_problem
    assert "training: 10 images; published: 25,574" in console.export_text()
    path = next((root / "annotations_detectron2" / "training").glob("*.tif"))
    Image.fromarray(np.full((40, 48), 900, np.uint16)).save(path)
    other = path.with_name("training_00000001.tif")
    Image.fromarray(np.zeros((40, 48), np.uint8)).save(other)
    reasons = {b.file.name: b.reason for b in check_data(config, QUIET).broken}
    assert reasons[path.name].startswith("ids [848] are no classes (0 to 846")
    assert reasons[other.name].startswith("a mask of this data set must be a 16-bit grey image, not 'L'")
    with pytest.raises(UserError, match="are no classes of this data set"):
        Image.fromarray(np.full((40, 48), 900, np.uint16)).save(other)
        starseg.train(config, console=QUIET)


@pytest.mark.parametrize("method", ["star", pytest.param("mib", marks=pytest.mark.slow)])
def test_three_steps(root: Path, method: str) -> None:
    config = parse_config(_tree(root, method))
    run = starseg.train(config, console=QUIET)
    results = read_json(run / "results.json")
    assert list(results["steps"][2]["iou"]) == ["1", "255", "256", "257", "847"]
    info = load_info(run / "step_2")
    assert info.mask_ids == [WIDE_IGNORE, *VALUES]
    model, info = load_model(run / "step_2")
    assert (
        evaluate_model(model, info, config, QUIET)["confusion"]
        == read_json(run / "step_2" / "metrics.json")["confusion"]
    )
    predictor = starseg.load(run / "step_2")
    photo = next((root / "images_detectron2" / "validation").glob("*.jpg"))
    predictor.rule = lambda logits: torch.full_like(logits[:, 0], 5, dtype=torch.int64)
    mask = predictor.predict(photo)
    assert mask.dtype == np.uint16 and set(np.unique(mask)) == {846}
    assert not predict_files(starseg.load(run / "step_2"), [str(photo)], run / "found", QUIET, overlays=True)
    assert set(np.unique(read_mask(next((run / "found").glob("*.png")), wide=True))) <= set(VALUES)
    write_report([run], run / "report", QUIET)


class WideHarness(MethodHarness):
    """Run of a method on int32 labels, with 65535 for ignored pixels."""

    def batch(self, step: int) -> Batch:
        """Return the images of a step with the labels in the other type."""
        batch = super().batch(step)
        labels = batch.labels.int()
        return replace(batch, labels=torch.where(labels == 255, WIDE_IGNORE, labels))


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if METHODS[name].wide])
def test_steps_are_those_on_8_bit_labels(name: str) -> None:
    narrow, wide = MethodHarness(name), WideHarness(name)
    for run in (narrow, wide):
        run.walk(len(run.task))
    assert narrow.model is not None and wide.model is not None
    torch.testing.assert_close(wide.model.state_dict(), narrow.model.state_dict())
    torch.testing.assert_close(wide.state, narrow.state)


def test_types_of_labels() -> None:
    labels = torch.tensor([0, 3, 255], dtype=torch.uint8)
    assert ignored_id(labels) == 255 and signed_ids(labels).dtype == torch.int64
    assert ignored_id(labels.int()) == WIDE_IGNORE and signed_ids(labels.int()).dtype == torch.int32
    for names, wide in ((255, False), (256, True), (300, True)):  # with the background: 254, 255 and 299 classes
        task, label_map = TaskSequence("t", ((names - 1,),), tuple(map(str, range(names)))), LabelMap.make(names)
        table = label_map.compose(task.relabelling(0, "train"))
        assert task.wide == label_map.wide == wide and table[names - 1] == 1 and table[-1] == len(table) - 1
        assert label_map.columns == (256 if not wide else names + 1)


def test_a_method_for_few_classes_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"method constellation cannot be trained on .*at most 254 classes"):
        starseg.train(parse_config(_tree(root, "constellation")), console=QUIET)
