"""`starseg learn` turns a folder of images and masks into a step."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from commands import command
from starseg.config import Strict, load_config
from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.photos import read_indices
from starseg.data.datasets.folder import open_folder
from starseg.data.images import read_mask
from starseg.data.palette import IGNORE_COLOUR, paint
from starseg.data.samples import Batch
from starseg.data.validation import split_images
from starseg.engine.checkpoint import load_bank, load_info
from starseg.engine.fit import StepTraining
from starseg.errors import UserError
from starseg.finetuning.defaults import FIRST, LATER, batch_size, classifier_epochs
from starseg.finetuning.prepare import open_source_step, prepare_step
from starseg.finetuning.run import LearnRequest, learn
from starseg.methods import METHODS
from starseg.utils.files import read_json

Folder = Callable[..., tuple[Path, Path]]


def _first(folder: Folder, tmp_path: Path, *names: str, method: str | None = "star") -> Path:
    """A first step."""
    request = LearnRequest(None, *folder(*names), ",".join(names), tmp_path / "first", method, "test_resnet")
    done = learn(dataclasses.replace(request, pretrained=False, crop=64, epochs=2, lr=0.02), Console(quiet=True))
    assert done is not None
    return done


def test_the_story(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    images, masks = folder("disc", "square")
    new = ["learn", "--new", "--images", images, "--masks", masks, "--classes", "disc,square", "--out"]
    tiny = ["--backbone", "test_resnet", "--pretrained", "no", "--crop", 64, "--epochs", 2]
    assert command(monkeypatch, *new, tmp_path / "first", *tiny) == 0, capsys.readouterr().err
    images, masks = folder("heart", "disc")
    args = ["--images", images, "--masks", masks, "--classes", "heart,disc", "--epochs", 2]
    first, run = tmp_path / "first" / "step_0", tmp_path / "run"
    capsys.readouterr()
    assert command(monkeypatch, "learn", first, *args, "--out", run) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    assert "before" in text and "not labelled: square" in text and "heart (new)" in text
    info = load_info(run / "step_1")
    assert (info.names, info.dataset_ids) == (["background", "disc", "square", "heart"], [0, 1, 2, 3])
    assert info.method == "constellation" and len(load_bank(run / "step_1")["counts"]) == 4
    assert command(monkeypatch, "predict", run / "step_1", images, "--out", tmp_path / "masks") == 0
    found = {int(i) for p in (tmp_path / "masks").glob("*.png") for i in np.unique(read_mask(p))}
    assert found <= {0, 1, 2, 3}
    assert command(monkeypatch, "eval", run / "step_1", "--json", tmp_path / "e.json") == 0
    iou = read_json(tmp_path / "e.json")["iou"]
    assert iou == read_json(run / "results.json")["steps"][-1]["iou"] and iou["square"] is None
    assert iou == read_json(run / "learn" / "before_after.json")["steps"]["step_1"]["iou"]
    images, masks = folder("hexagon")
    args = ["--images", images, "--masks", masks, "--classes", "hexagon", "--epochs", 1]
    assert command(monkeypatch, "learn", run / "step_1", *args, "--out", tmp_path / "more") == 0
    assert load_info(tmp_path / "more" / "step_2").names[-1] == "hexagon"
    assert command(monkeypatch, "report", tmp_path / "more", "--out", tmp_path / "report") == 0


def test_a_dry_run_writes_nothing(folder: Folder, tmp_path: Path) -> None:
    first = _first(folder, tmp_path, "disc", "square")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    console = Console(record=True, width=160)
    request = LearnRequest(first, *folder("heart"), "heart", tmp_path / "run")
    before |= {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert learn(request, console, dry_run=True) is None
    text = console.export_text()
    assert "time: about" in text and "replayed per iteration" in text and "heart" in text
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_class_without_a_stored_cell_is_named(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _first(folder, tmp_path, "disc", "square")
    source = open_source_step(first, "star")
    assert source.stored is not None
    console = Console(record=True, width=160)
    request = LearnRequest(first, *folder("heart"), "heart", tmp_path / "run")
    without = dataclasses.replace(source, stored=source.stored * torch.tensor([0, 1, 0]))
    monkeypatch.setattr("starseg.finetuning.run.open_source_step", lambda folder, method: without)
    learn(request, console, dry_run=True)
    assert "note: no stored cell shows square, so that nothing of it is replayed" in console.export_text()


def test_the_same_request_resumes_and_another_is_refused(folder: Folder, tmp_path: Path) -> None:
    first = _first(folder, tmp_path, "disc", "square")
    request = LearnRequest(first, *folder("heart"), "heart", tmp_path / "run", epochs=1)
    done = learn(request, Console(quiet=True))
    assert done is not None
    written = (done / "metrics.json").stat().st_mtime_ns
    console = Console(record=True)
    learn(request, console)
    assert "finished already" in console.export_text() and (done / "metrics.json").stat().st_mtime_ns == written
    for other in (
        dataclasses.replace(request, seed=1),
        dataclasses.replace(request, source=done, classes="hexagon,heart"),
    ):
        with pytest.raises(UserError, match="give a free place"):
            learn(other, Console(quiet=True))
    with pytest.raises(UserError, match=r"another configuration:\n.*lr"):
        learn(dataclasses.replace(request, lr=0.5), Console(quiet=True))
    assert (done / "metrics.json").stat().st_mtime_ns == written


def test_a_run_in_progress_is_left_alone(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first epoch nothing is saved yet, but the data that it reads are not taken from it."""
    request = LearnRequest(None, *folder("heart", count=8), "heart", tmp_path / "run", pretrained=False, epochs=1)
    request = dataclasses.replace(request, backbone="test_resnet", crop=64)
    other = dataclasses.replace(request, seed=1)
    real, refused = StepTraining.iterate, []

    def meanwhile(self: StepTraining, raw: Batch) -> dict[str, torch.Tensor]:
        if not refused:
            refused.append(True)
            before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
            with pytest.raises(UserError, match=rf"another process \(pid {os.getpid()}\) is running"):
                learn(other, Console(quiet=True))
            assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
        return real(self, raw)

    monkeypatch.setattr(StepTraining, "iterate", meanwhile)
    done = learn(request, Console(quiet=True))
    assert refused and done is not None and (done / "metrics.json").is_file()


def test_a_folder_with_only_a_lock_file_is_free(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("1\n")
    request = LearnRequest(None, *folder("heart", count=8), "heart", tmp_path / "run", pretrained=False, epochs=1)
    assert learn(dataclasses.replace(request, backbone="test_resnet", crop=64), Console(quiet=True)) is not None


def test_defaults_fit_the_data(folder: Folder, tmp_path: Path) -> None:
    request = LearnRequest(
        None, *folder("disc", "heart", count=20), "disc,heart", tmp_path / "run", backbone="test_resnet"
    )
    console = Console(record=True, width=200)
    learn(dataclasses.replace(request, pretrained=False), console, dry_run=True)
    prepared_step = prepare_step(request, None, tmp_path / "prepared", Console(quiet=True))
    train = int(prepared_step.training.sum())
    batch = train // 4
    text = console.export_text()
    assert f"batches of {batch}, crops of 128, learning rate 0.01" in text
    assert f"100 epochs of {train // batch} iterations" in text


@pytest.mark.parametrize(
    ("images", "batch", "first", "later"),
    [
        (6, 2, (100, 1e-2), (100, 4.2e-4)),
        (20, 5, (100, 1e-2), (100, 3.1e-4)),
        (128, 16, (75, 1e-2), (50, 3.1e-4)),
        (340, 16, (29, 1e-2), (20, 3e-4)),
        (10_000, 16, (10, 1.2e-3), (10, 1e-4)),
    ],
)
def test_schedules(images: int, batch: int, first: tuple[int, float], later: tuple[int, float]) -> None:
    """Fewer images get more epochs, and fewer iterations a higher learning rate."""
    assert batch_size(images) == batch
    for phase, (epochs, rate) in ((FIRST, first), (LATER, later)):
        assert phase.epochs(images) == epochs
        assert phase.learning_rate(epochs * (images // batch)) == rate


def test_known_classes_keep_their_ids(folder: Folder, tmp_path: Path, step_dir: Path) -> None:
    request = LearnRequest(step_dir, *folder("heart", "disc"), "heart,Dog", tmp_path / "run", method="finetune")
    console = Console(record=True, width=160)
    learn(request, console, dry_run=True)
    rows = [line.split() for line in console.export_text().splitlines()]
    assert any(row[1:6:2] == ["heart", "13", "new"] for row in rows)
    assert any(row[1:6:2] == ["dog", "12", "known"] for row in rows)


def test_a_method_whose_options_learn_cannot_give(step_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Required(Strict):
        teacher: str

    monkeypatch.setattr(METHODS["plop"], "Options", Required)
    with pytest.raises(UserError, match=r"--method plop: has options without a default(.|\n)*plop\.teacher"):
        open_source_step(step_dir, "plop")
    with pytest.raises(UserError, match=r"lwf cannot continue from it.* or give --method finetune"):
        open_source_step(step_dir, "lwf")


def test_prepared_data(folder: Folder, tmp_path: Path) -> None:
    images, masks = folder("disc", "heart")
    prepared_step = prepare_step(
        LearnRequest(None, images, masks, "disc,heart", tmp_path), None, tmp_path / "p", Console(quiet=True)
    )
    data = open_folder(tmp_path / "p")
    assert data.names == ("background", "disc", "heart") and not data.unlabelled
    assert len(data.train) + len(data.test) == len(prepared_step.photos) and len(data.test) == prepared_step.val.sum()
    assert all(p.is_file() for p in data.train.images + data.test.masks)
    again = prepare_step(
        LearnRequest(None, images, masks, "disc,heart", tmp_path), None, tmp_path / "q", Console(quiet=True)
    )
    np.testing.assert_array_equal(prepared_step.val, again.val)


def test_the_split_keeps_every_class_in_both_parts() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        shown = rng.random((30, 4)) < [0.5, 0.3, 0.1, 0.0]
        shown[:3, 2] = True
        val = split_images(shown, 0.15, rng)
        for column in (0, 1, 2):
            assert shown[val, column].any() and shown[~val, column].any()
        assert 3 <= val.sum() <= 12
    assert not split_images(np.array([[True]]), 0.5, np.random.default_rng(0)).any()


def test_colour_masks(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("background\ncat #800000\ntraffic light 0 128 0\n")
    classes = read_classes(str(tmp_path / "classes.txt"))
    assert classes.names == ("background", "cat", "traffic light")
    assert classes.colours == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    ids = np.array([[0, 1, 2], [2, 255, 1]], np.uint8)
    Image.fromarray(paint(ids)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_indices(tmp_path / "a.png", (2, 3), classes), ids)
    Image.fromarray(paint(ids)).quantize(8).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_indices(tmp_path / "p.png", (2, 3), classes), ids)
    assert paint(np.array([255], np.uint8)).tolist() == [list(IGNORE_COLOUR)]
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: colour 1 2 3 is no class of .*classes\.txt"):
        read_indices(tmp_path / "b.png", (2, 3), classes)


def test_labelme(tmp_path: Path) -> None:
    square = {"label": "Cat", "points": [[0, 0], [3, 0], [3, 3], [0, 3]], "shape_type": "polygon"}
    tree = {"imageHeight": 8, "imageWidth": 10, "shapes": [square, {**square, "label": "dog"}]}
    (tmp_path / "a.json").write_text(json.dumps({**tree, "shapes": [square]}))
    ids = read_indices(tmp_path / "a.json", (8, 10), read_classes("cat"))
    assert ids.shape == (8, 10) and ids.sum() == 16 and ids[0, 0] == 1
    (tmp_path / "b.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"b\.json: shape 2: label 'dog' is none of the classes cat"):
        read_indices(tmp_path / "b.json", (8, 10), read_classes("cat"))
    with pytest.raises(UserError, match="this mask is 10x8"):
        read_indices(tmp_path / "b.json", (8, 11), read_classes("cat"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog\n", "first line must be 'background'"),
        ("background\n", "at least one class beside"),
        ("background\ncat\nCat\n", "names a class twice"),
        ("background\ncat 1 2 3\ndog\n", "no colour while others have one: dog"),
        ("background\ncat 0 0 0\n", "two classes have the same colour"),
        ("background\ncat 300 0 0\n", "from 0 to 255"),
    ],
)
def test_class_lists_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(str(tmp_path / "classes.txt"))


def test_a_small_folder_replays_a_fraction_and_keeps_the_whole_bank(folder: Folder, tmp_path: Path) -> None:
    first = _first(folder, tmp_path, "disc", "square")
    done = learn(
        LearnRequest(first, *folder("heart", count=6), "heart", tmp_path / "run", epochs=1), Console(quiet=True)
    )
    assert done is not None
    old, new = load_bank(first)["counts"], load_bank(done)["counts"]
    assert load_info(done).method == "star"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["star"]["replay"] < 1
    assert torch.equal(new[1:3], old[1:]) and torch.equal(
        load_bank(done)["prototypes"][:2], load_bank(first)["prototypes"]
    )


def test_constellation_is_the_default_after_constellation(folder: Folder, tmp_path: Path) -> None:
    first = _first(folder, tmp_path, "disc", "square", method=None)
    config = load_config(tmp_path / "first" / "config.yaml")
    assert (load_info(first).method, config.train.base.epochs, config.train.base.lr) == ("constellation", 2, 0.02)
    request = LearnRequest(first, *folder("heart", count=6), "heart", tmp_path / "run", epochs=3, lr=0.05)
    console = Console(record=True, width=200)
    assert learn(request, console, dry_run=True) is None
    text = console.export_text()
    assert "schedule: 3 epochs of 7 iterations on the features of 3 crops per image" in text
    assert "learning rate 0.05, method constellation" in text and "time: about" in text
    done = learn(request, Console(quiet=True))
    assert done is not None
    options = load_config(tmp_path / "run" / "config.yaml").method_section("constellation")
    assert (options["epochs"], options["lr"]) == (3, 0.05) and options["replay"] < 1
    assert torch.equal(load_bank(done)["counts"][1:3], load_bank(first)["counts"][1:])


def test_few_iterations_get_more_epochs() -> None:
    assert [classifier_epochs(iterations, 6) for iterations in (10, 66, 67, 1000)] == [40, 7, 6, 6]


def test_an_interrupted_run_resumes(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _first(folder, tmp_path, "disc", "square")
    request = LearnRequest(first, *folder("heart"), "heart", tmp_path / "run", epochs=2)
    real, calls = StepTraining.iterate, []

    def broken(self: StepTraining, raw: Batch) -> dict[str, torch.Tensor]:
        calls.append(raw)
        if len(calls) == self.ctx.iterations + 2:
            raise KeyboardInterrupt
        return real(self, raw)

    monkeypatch.setattr(StepTraining, "iterate", broken)
    with pytest.raises(KeyboardInterrupt):
        learn(request, Console(quiet=True))
    console = Console(record=True)
    done = learn(request, console)
    assert done is not None and (done / "metrics.json").is_file()
    assert "resuming at iteration" in console.export_text()
