"""`starseg data check` finds broken files, wrong layouts and tasks that cannot be trained."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from starseg.cli.main import main
from starseg.config import parse_config
from starseg.data.datasets.voc import VOC_NAMES, open_voc
from starseg.report.data_check import check_data

QUIET = Console(quiet=True)


@pytest.fixture
def copy(tiny: dict, shapes: Path, tmp_path: Path) -> dict:
    """The tiny run on a copy of the data that may be damaged."""
    return {**tiny, "data": {**tiny["data"], "root": str(shutil.copytree(shapes, tmp_path / "copy"))}}


def _check(settings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict]:
    """Exit code and findings of the command."""
    config, found = tmp_path / "c.yaml", tmp_path / "found.json"
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(sys, "argv", ["starseg", "data", "check", str(config), "--json", str(found)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), json.loads(found.read_text()) if found.is_file() else {}


def test_a_sound_data_set(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, found = _check(tiny, tmp_path, monkeypatch)
    text = capsys.readouterr().out
    assert code == 0 and found["usable"] and not found["broken"] and "usable: no file is broken" in text
    assert found["splits"]["training"] == {"images": 48, "published": None, "missing": 0} and not found["repeated"]
    assert [step["step"] for step in found["steps"]] == [0, 1, 2]
    for split, files in open_voc(Path(tiny["data"]["root"])).splits.items():
        masks = np.stack([np.asarray(Image.open(p)) for p in files.masks])
        for entry in (c for step in found["steps"] for c in step["classes"]):
            assert entry[split]["pixels"] == (masks == entry["id"]).sum()
            assert entry[split]["images"] == (masks == entry["id"]).any((1, 2)).sum()
    assert found["steps"][1]["images"]["training"] == found["steps"][1]["classes"][0]["training"]["images"]
    assert not Path(tiny["out"]).exists()


def test_every_broken_file_is_listed(
    copy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = Path(copy["data"]["root"])
    images, masks = root / "JPEGImages", root / "SegmentationClassAug"

    def image(number: int) -> Path:
        return images / f"train_{number:05d}.jpg"

    def mask(number: int) -> Path:
        return masks / f"train_{number:05d}.png"

    image(0).write_bytes(image(0).read_bytes()[:900])
    image(1).unlink()
    mask(2).write_bytes(b"no mask")
    Image.new("RGB", (64, 64)).save(mask(3))
    Image.fromarray(np.zeros((64, 32), np.uint8)).save(mask(4))
    Image.fromarray(np.full((64, 64), 6, np.uint8)).save(mask(5))
    image(6).write_bytes(b"")
    mask(6).unlink()
    Image.fromarray(np.full((32, 64), 17, np.uint8)).save(root / "SegmentationClass" / "val_00000.png")
    wanted = {
        image(0): "cannot read this image (image file is truncated",
        image(1): "cannot read this image (No such file or directory)",
        mask(2): "cannot read this mask (cannot identify image file",
        mask(3): "a mask must be an 8-bit palette or grey image, not 'RGB'",
        mask(4): "this mask is 32x64, its image 64x64",
        mask(5): "ids [6] are no classes (0 to 5, 255 ignored)",
        image(6): "cannot read this image (cannot identify image file",
        mask(6): "cannot read this mask (No such file or directory)",
    }
    code, found = _check(copy, tmp_path, monkeypatch)
    text = capsys.readouterr().out
    assert code == 1 and not found["usable"] and "9 broken files: fix them before training" in text
    training = {Path(b["file"]): b["reason"] for b in found["broken"] if b["split"] == "training"}
    assert set(training) == set(wanted)
    for path, reason in wanted.items():
        assert training[path].startswith(reason) and f"{path}: {reason}" in text
    test = [b["reason"] for b in found["broken"] if b["split"] == "test"]
    assert ["ids [17]" in test[0], "64x32, its image 64x64" in test[1], len(test)] == [True, True, 2]


def test_images_that_are_listed_twice_or_in_both_splits_are_named(
    copy: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = Path(copy["data"]["root"])
    train, val = root / "ImageSets/Segmentation/train_aug.txt", root / "ImageSets/Segmentation/val.txt"
    lines = train.read_text().splitlines()
    shutil.copy(root / "SegmentationClassAug" / "train_00003.png", root / "SegmentationClass")
    (root / "JPEGImages" / "link.jpg").symlink_to(root / "JPEGImages" / "train_00001.jpg")
    lines += [lines[0], "/JPEGImages/link.jpg /SegmentationClassAug/train_00001.png"]
    train.write_text("\n".join(lines))
    val.write_text(val.read_text() + "train_00003\n")
    code, found = _check(copy, tmp_path, monkeypatch)
    names = [root.resolve() / "JPEGImages" / f"train_{number:05d}.jpg" for number in (0, 1, 3)]
    assert found["repeated"] == [
        f"training: 2 images are listed more than once and count as often: {names[0]}, {names[1]}",
        f"1 test images are training images, so that results are too high: {names[2]}",
    ]
    out = capsys.readouterr().out
    assert code == 0 and all(line in out for line in found["repeated"])


def test_an_exif_rotated_image_matches_its_upright_mask(copy: dict) -> None:
    root = Path(copy["data"]["root"])
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, upright in ((0, True), (1, False)):
        Image.new("RGB", (64, 48)).save(root / f"JPEGImages/train_{number:05d}.jpg", exif=exif)
        mask = np.ones((64, 48) if upright else (48, 64), np.uint8)
        Image.fromarray(mask).save(root / f"SegmentationClassAug/train_{number:05d}.png")
    broken = check_data(parse_config(copy), QUIET).broken
    assert [(b.file.name, b.reason[:49]) for b in broken] == [
        ("train_00001.png", "this mask is 64x48, its image 48x64 pixels when u")
    ]


def test_a_task_that_cannot_be_trained_is_not_a_broken_file(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    code, found = _check({**tiny, "train": {"batch_size": 48}}, tmp_path, monkeypatch)
    assert code == 2 and not found["broken"] and "fewer than train.batch_size" in found["task_problem"]
    assert "the task cannot be trained" in capsys.readouterr().out


def test_a_wrong_layout_is_a_user_error(
    tiny: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    wrong = {**tiny, "data": {"dataset": "ade", "root": tiny["data"]["root"]}}
    assert _check(wrong, tmp_path, monkeypatch) == (2, {})
    assert "objectInfo150.txt: cannot read this list" in capsys.readouterr().err


def test_published_counts_belong_to_the_published_classes(copy: dict, ade_shapes: Path) -> None:
    ade = {"dataset": "ade", "root": str(ade_shapes)}
    report = check_data(parse_config({**copy, "data": ade, "task": {"steps": [[1, 2, 3], [4], [5]]}}), QUIET)
    assert [report.missing("training"), report.missing("test")] == [20_210 - 48, 2_000 - 12]
    (Path(copy["data"]["root"]) / "classes.txt").write_text("\n".join(VOC_NAMES))
    report = check_data(parse_config({**copy, "task": {"steps": [[1, 2, 3], [4], [5]]}}), QUIET)
    assert [report.missing("training"), report.missing("test")] == [10_582 - 48, 1_449 - 12]


def test_the_real_subset_is_usable_and_recognised_as_a_subset(
    voc_subset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    task = {"steps": [["cat", "cow", "dog"], ["horse"], ["person"], ["sheep"]]}
    code, found = _check({"data": {"root": str(voc_subset)}, "task": task}, tmp_path, monkeypatch)
    assert code == 0 and found["usable"]
    assert found["splits"]["training"] == {"images": 3131, "published": 10582, "missing": 7451}
    assert [step["images"]["training"] for step in found["steps"]] == [2406, 444, 588, 299]
    text = capsys.readouterr().out
    assert "training: 3,131 images; published: 10,582, 7,451 missing" in text and "SegmentationClassAug.zip" in text
