"""A model without a background, from the first step of `starseg learn` to masks, reports and exports."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import command
from starseg.data.images import read_mask
from starseg.data.palette import voc_palette
from starseg.engine.checkpoint import load_info
from starseg.inference.predictor import load
from starseg.models.prediction import LargestClass
from starseg.utils.files import read_json

NAMES = ["sky", "building", "pole", "road", "car"]
TINY = ["--backbone", "test_resnet", "--pretrained", "no", "--crop", "64", "--epochs", "2"]


def _scenes(folder: Path, values: Sequence[int], count: int = 12) -> list[str]:
    """Write photos of stripes in the colours of their values, and their masks; return the options that name them."""
    for kind in ("photos", "masks"):
        (folder / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        mask = np.repeat(rng.permutation(np.array(values, np.uint8)), 64 // len(values))[:, None].repeat(64, 1)
        photo = voc_palette()[9 * mask + 1] + rng.integers(0, 30, (*mask.shape, 3), np.uint8)
        Image.fromarray(photo).save(folder / "photos" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
    return ["--images", str(folder / "photos"), "--masks", str(folder / "masks")]


def _values(folder: Path) -> set[int]:
    return {int(v) for path in folder.glob("*.png") for v in np.unique(read_mask(path))}


@pytest.fixture
def first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Path:
    """A first step of five classes 0 to 4, with void 5."""
    scenes = _scenes(tmp_path / "first", range(6))
    options = ["--classes", ",".join(NAMES), "--no-background", "--ignore", "5", *TINY, "--out", tmp_path / "run"]
    assert command(monkeypatch, "learn", "--new", *scenes, *options) == 0
    assert "ids in predicted masks: 0 sky, 1 building, 2 pole, 3 road, 4 car\n" in capsys.readouterr().out
    return tmp_path / "run" / "step_0"


def test_the_first_step(first: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = load_info(first)
    assert not info.background and info.predicted_ids == [255, 0, 1, 2, 3, 4]
    assert info.predictable == dict(enumerate(NAMES))
    figures = read_json(first / "metrics.json")
    assert list(figures["iou"]) == NAMES and np.isclose(figures["miou"]["old"], np.mean([*figures["iou"].values()]))
    assert not any(figures["confusion"][0]) and not any(row[0] for row in figures["confusion"])
    assert figures["miou"]["all"] == figures["miou_foreground"]["all"]
    photos = tmp_path / "first" / "photos"
    out = tmp_path / "found"
    assert (
        command(monkeypatch, "predict", first, photos, "--out", out, "--overlays", "--json", tmp_path / "a.json") == 0
    )
    assert _values(out) <= set(range(5))
    shares = read_json(tmp_path / "a.json")
    assert shares["classes"] == NAMES and all(np.isclose(sum(i["percent"].values()), 100) for i in shares["images"])
    palette = Image.open(min(out.glob("*.png"))).getpalette()
    assert palette is not None and palette[:3] == voc_palette()[1].tolist()
    assert command(monkeypatch, "eval", first, "--json", tmp_path / "eval.json") == 0
    assert read_json(tmp_path / "eval.json")["iou"] == figures["iou"]


def test_masks_of_a_model_without_a_background_are_those_it_was_taught(first: Path, tmp_path: Path) -> None:
    given = tmp_path / "first"
    taught = [read_mask(first.parent / "learn" / "masks" / f"{i}.png") for i in range(12)]
    values = [read_mask(given / "masks" / f"{i}.png") for i in range(12)]
    np.testing.assert_array_equal(taught, np.where(np.array(values) == 5, 255, np.array(values) + 1))
    predictor = load(first)
    for training_id, name in enumerate(NAMES, 1):
        predictor.rule = lambda logits, k=training_id: torch.full_like(logits[:, 0], k, dtype=torch.int64)
        mask = predictor.predict(given / "photos" / "0.png")
        assert predictor.info.predictable[int(mask.max())] == name and int(mask.min()) == training_id - 1


def test_the_rule_takes_the_largest_logit_of_a_class() -> None:
    logits = torch.tensor([[9.0, -3.0, -1.0, -2.0], [0.0, -0.5, -7.0, -8.0]])
    assert LargestClass(lead=1)(logits).tolist() == [2, 1] and LargestClass()(logits).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("classes", "values", "options"),
    [
        ([*NAMES, "tree"], (0, 1, 2, 3, 4, 5), ["--no-background"]),
        (["tree"], (0, 1), []),
        (["car", "tree"], (0, 1, 2), ["--ignore", "0"]),
    ],
)
def test_a_second_step(
    first: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    classes: list[str],
    values: tuple[int, ...],
    options: list[str],
) -> None:
    scenes = _scenes(tmp_path / "second", values)
    args = ["--classes", ",".join(classes), *options, "--epochs", "2", "--out", tmp_path / "next"]
    assert command(monkeypatch, "learn", first, *scenes, *args) == 0
    info = load_info(tmp_path / "next" / "step_1")
    assert not info.background and info.names[1:] == [*NAMES, "tree"]
    assert info.predicted_ids == [255, 0, 1, 2, 3, 4, 5]
    iou = read_json(tmp_path / "next" / "step_1" / "metrics.json")["iou"]
    assert list(iou) == [*NAMES, "tree"] and {n for n, v in iou.items() if v is not None} <= set(classes)
    assert (
        command(
            monkeypatch,
            "predict",
            tmp_path / "next" / "step_1",
            tmp_path / "first" / "photos",
            "--out",
            tmp_path / "found",
        )
        == 0
    )
    assert command(monkeypatch, "report", tmp_path / "next", "--out", tmp_path / "report") == 0


def test_exports(first: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    args = ["--images", tmp_path / "first" / "photos", "--hub", tmp_path / "hub"]
    assert command(monkeypatch, "export", first, "--out", tmp_path / "a.onnx", *args) == 0
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    image = np.asarray(Image.open(tmp_path / "first" / "photos" / "0.png")).transpose(2, 0, 1)[None]
    assert set(np.unique(session.run(["mask"], {"images": image})[0])) <= set(range(5))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| 0 | sky |" in card and "background" not in card


@pytest.mark.parametrize(
    ("classes", "values", "options", "message"),
    [
        (["tree"], (0, 1, 2), [], "indices [2] are no lines of tree"),
        (["tree"], (0, 1), ["--no-background"], "indices [1] are no lines of tree"),
        (["tree", "bush"], (0, 1), [], "no mask shows bush"),
        (["car"], (0, 1), [], "nothing to learn"),
        (["tree"], (0, 1), ["--ignore", "1"], "--ignore 1: is the value of tree"),
        (["background", "tree"], (0, 1), ["--no-background"], "names 'background'"),
    ],
)
def test_wrong_second_steps(
    first: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    classes: list[str],
    values: tuple[int, ...],
    options: list[str],
    message: str,
) -> None:
    scenes = _scenes(tmp_path / "second", values)
    args = ["--classes", ",".join(classes), *options, "--epochs", "2", "--out", tmp_path / "next"]
    assert command(monkeypatch, "learn", first, *scenes, *args) == 2
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "next").exists()
