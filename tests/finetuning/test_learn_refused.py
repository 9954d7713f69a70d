"""`starseg learn` refuses what it cannot do before it writes anything."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from commands import command
from starseg.errors import UserError
from starseg.finetuning.run import LearnRequest, learn

Folder = Callable[..., tuple[Path, Path]]


def _break(name: str, images: Path, masks: Path) -> None:
    mask = min(masks.iterdir())
    if name == "image without mask":
        mask.unlink()
    elif name == "other size":
        Image.new("L", (5, 5)).save(mask)
    elif name == "unknown id":
        Image.new("L", (64, 64), 9).save(mask)
    elif name == "empty class":
        for path in masks.iterdir():
            Image.new("L", (64, 64)).save(path)
    elif name == "two images of a stem":
        shutil.copy(min(images.iterdir()), min(images.iterdir()).with_suffix(".png"))
    elif name == "no images":
        shutil.rmtree(images)
        images.mkdir()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image without mask", r"no mask .*\.png \(nor \.json\); 1 of 8 images"),
        ("other size", r"this mask is 5x5, its image 64x64"),
        ("unknown id", r"indices \[9\] are no lines of heart"),
        ("empty class", r"no mask shows heart"),
        ("two images of a stem", r"has the same stem"),
        ("no images", r"no image in this folder"),
    ],
)
def test_folders_that_are_refused(folder: Folder, tmp_path: Path, name: str, message: str) -> None:
    images, masks = folder("heart", count=8)
    _break(name, images, masks)
    with pytest.raises(UserError, match=message):
        learn(LearnRequest(None, images, masks, "heart", tmp_path / "run", pretrained=False), Console(quiet=True))
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".learn-*"))


def test_requests_that_are_refused(folder: Folder, tmp_path: Path, step_dir: Path) -> None:
    images, masks = folder("heart", count=8)
    request = LearnRequest(step_dir, images, masks, "heart", tmp_path / "run")
    with pytest.raises(UserError, match="no prototype bank"):
        learn(request, Console(quiet=True))
    fine = dataclasses.replace(request, method="finetune")
    for changes, message in (
        ({"classes": "cow"}, "nothing to learn"),
        ({"crop": 128}, "--crop 128"),
        ({"val_share": 1.0}, "--val-share"),
        ({"lr": 0.0}, "--lr: expected a learning rate above 0"),
        ({"out": tmp_path}, "did not make"),
        ({"classes": "missing/classes.txt"}, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            learn(dataclasses.replace(fine, **changes), Console(quiet=True))
    (step_dir / "metrics.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        learn(fine, Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"), [({"backbone": "nosuchnet"}, "nosuchnet"), ({"pretrained": Path("none.pt")}, "none.pt")]
)
def test_an_unavailable_network_is_refused_before_a_mask_is_read(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("starseg.finetuning.run.prepare_step", lambda *_: pytest.fail("reads masks"))
    request = LearnRequest(None, *folder("heart", count=3), "heart", tmp_path / "run", backbone="test_resnet")
    with pytest.raises(UserError, match=message):
        learn(dataclasses.replace(request, **changes), Console(quiet=True))


def test_two_images_are_too_few_and_three_are_enough(folder: Folder, tmp_path: Path) -> None:
    request = LearnRequest(None, *folder("heart", count=3), "heart", tmp_path / "run", backbone="test_resnet")
    request = dataclasses.replace(request, pretrained=False)
    assert learn(dataclasses.replace(request, crop=64, epochs=1), Console(quiet=True)) is not None
    lone = min(request.images.iterdir())
    lone.unlink()
    with pytest.raises(UserError, match="expected at least 3"):
        learn(dataclasses.replace(request, out=tmp_path / "other"), Console(quiet=True))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--new", "step"], "give a step directory to continue from, or --new"),
        ([], "give a step directory to continue from, or --new"),
        (["step", "--backbone", "test_resnet"], "only with --new"),
        (["--new", "--method", "nobody"], "--method: expected one of adapter"),
    ],
)
def test_commands_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, args: list[str], message: str
) -> None:
    rest = ["--images", "i", "--masks", "m", "--classes", "c", "--out", "/nowhere/run"]
    assert command(monkeypatch, "learn", *args, *rest) == 2
    assert message in capsys.readouterr().err
