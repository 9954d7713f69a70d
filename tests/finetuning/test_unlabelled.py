"""Old classes that new masks do not label: pixels in which the old model sees one are not scored as background."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import command
from starseg.data.datasets.folder import open_folder
from starseg.data.images import read_mask
from starseg.data.index import class_index
from starseg.engine.metrics import summarize
from starseg.inference.predictor import Predictor
from starseg.utils.files import read_json

TINY = ["--backbone", "test_resnet", "--pretrained", "no", "--crop", "64", "--epochs", "1"]


def _folder(root: Path, classes: dict[int, slice], count: int = 10) -> list[object]:
    """Write photos of 64 px whose masks have the given values in bands of rows; return the options that name them."""
    rng = np.random.default_rng(0)
    for number in range(count):
        mask = np.zeros((64, 64), np.uint8)
        for value, rows in classes.items():
            mask[rows] = value
        photo = (60 * mask[..., None] + rng.integers(0, 40, (64, 64, 3))).astype(np.uint8)
        for kind, array in (("photos", photo), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / kind / f"{number}.png")
    return ["--images", root / "photos", "--masks", root / "masks"]


def test_only_false_positives_of_labelled_classes_remain(shapes: Path) -> None:
    from starseg.data.datasets.voc import open_voc

    dataset = replace(open_voc(shapes), unlabelled=frozenset({2}))
    # Rows and columns: background, a labelled class, the unlabelled one.
    matrix = np.array([[50, 4, 6], [3, 20, 1], [30, 8, 12]])
    scored = dataset.scored(matrix, [0, 1, 2])
    np.testing.assert_array_equal(scored, [[56, 4, 0], [4, 20, 0], [0, 8, 0]])
    hidden = dataset.unscored([0, 1, 2])
    figures = summarize(scored, ["background", "cat", "dog"], 2, unscored=hidden)
    assert figures["iou"] == {
        "background": pytest.approx(100 * 56 / (56 + 4 + 4)),
        "cat": pytest.approx(100 * 20 / (20 + 4 + 4 + 8)),
        "dog": None,
    }
    assert figures["pixel_accuracy"]["all"] == pytest.approx(100 * 76 / 84)
    # The labelled class is scored as if the pixels of the unlabelled one were background.
    plain = dataset.scored(np.array([[80, 12, 18], [3, 20, 1], [0, 0, 0]]), [0, 1, 2])
    assert summarize(plain, ["background", "cat", "dog"], 2)["iou"]["cat"] == figures["iou"]["cat"]


def test_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    first = _folder(tmp_path / "first", {1: slice(0, 20), 2: slice(30, 50)})
    assert command(monkeypatch, "learn", "--new", *first, "--classes", "cat,dog", *TINY, "--out", tmp_path / "a") == 0
    source = tmp_path / "a" / "step_0"
    assert not (tmp_path / "a" / "learn" / "seen").exists()
    horses = _folder(tmp_path / "second", {1: slice(40, 64)})
    seen = np.zeros((64, 64), np.uint8)
    seen[:10], seen[10:45, 32:] = 1, 2  # what the old model sees: cat above, dog below, partly beside the horse
    stream = Predictor.stream

    def sees(self: Predictor, *args: object, **options: object) -> object:
        for done in stream(self, *args, **options):  # type: ignore[arg-type]
            yield replace(done, mask=seen)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "stream", sees)
        args = ["--classes", "horse", "--epochs", "1", "--out", tmp_path / "b"]
        capsys.readouterr()
        assert command(monkeypatch, "learn", source, *horses, *args) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not labelled in these masks: cat, dog; not scored" in said
    unknown = 100 * (10 * 64 + 30 * 32) / (40 * 64)
    assert f"it sees them in {unknown:.1f} % of the pixels labelled background" in said
    dataset = open_folder(tmp_path / "b" / "learn")
    assert dataset.unlabelled == {1, 2} and all(path.parent.name == "seen" for path in dataset.test.masks)
    assert all(path.parent.name == "masks" for path in dataset.train.masks)
    for path in dataset.test.masks:
        given = read_mask(tmp_path / "second" / "masks" / path.name)
        np.testing.assert_array_equal(read_mask(path), np.where(given == 1, 3, seen))
    assert not class_index(dataset, dataset.test)[:, [1, 2]].any()
    figures = read_json(tmp_path / "b" / "step_1" / "metrics.json")
    assert figures["iou"]["cat"] is None and figures["iou"]["dog"] is None and figures["iou"]["horse"] is not None
    confusion = np.array(figures["confusion"])
    assert confusion[0].sum() == len(dataset.test) * (40 * 64 - 10 * 64 - 30 * 32) and not confusion[1:3, :3].any()
    again = tmp_path / "eval.json"
    assert command(monkeypatch, "eval", tmp_path / "b" / "step_1", "--json", again) == 0
    assert read_json(again)["iou"] == figures["iou"]
    told = read_json(tmp_path / "b" / "learn" / "before_after.json")
    assert told["unlabelled"] == ["cat", "dog"] and np.isclose(told["unknown"], unknown)
    assert told["steps"]["step_1"]["iou"]["horse"] == figures["iou"]["horse"]
    assert command(monkeypatch, "report", tmp_path / "b", "--out", tmp_path / "report") == 0


def test_masks_that_label_old_classes_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _folder(tmp_path / "first", {1: slice(0, 30)})
    assert command(monkeypatch, "learn", "--new", *first, "--classes", "cat", *TINY, "--out", tmp_path / "a") == 0
    both = _folder(tmp_path / "second", {1: slice(0, 20), 2: slice(40, 64)})
    args = ["--classes", "cat,horse", "--epochs", "1", "--out", tmp_path / "b"]
    assert command(monkeypatch, "learn", tmp_path / "a" / "step_0", *both, *args) == 0
    assert not (tmp_path / "b" / "learn" / "seen").exists()
    assert read_json(tmp_path / "b" / "learn" / "before_after.json")["unknown"] == 0
