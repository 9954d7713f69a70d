"""`starseg predict` on files with awkward names or damage: the others are predicted, and the exit code tells."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from commands import command
from starseg.errors import UserError
from starseg.inference.files import find_images, plan_targets, predict_files
from starseg.inference.predictor import Predictor, load
from starseg.utils.files import write_atomic

QUIET = Console(quiet=True)


@pytest.fixture
def predictor(step_dir: Path) -> Predictor:
    return load(step_dir, "cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.bmp")):
        noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def test_bad_files_among_many_are_reported(
    tmp_path: Path, photos: Path, step_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = (photos / "b.jpg").read_bytes()
    bad = {
        "cut.jpg": whole[:300],
        "empty.png": b"",
        "page.webp": b"<html>not found</html>",
        "caf\udce9.jpg": b"x",
        "line\nbreak.tif": b"II*\0",
        "[red]markup[x].jpg": b"x",
    }
    for name, data in bad.items():
        (photos / name).write_bytes(data)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(photos / "float.tif")
    Image.new("RGB", (900, 3)).save(photos / "thin.png")
    missing = tmp_path / "moved.jpg"
    json_file, out = tmp_path / "shares.json", tmp_path / "out"
    assert command(monkeypatch, "predict", step_dir, photos, missing, "--out", out, "--json", json_file) == 1
    written = json.loads(json_file.read_text())
    assert [Path(row["image"]).name for row in written["images"]] == ["a.png", "b.jpg", "c.bmp"]
    assert sorted(path.name for path in out.glob("*.png")) == ["a.png", "b.png", "c.png"]
    failed = {row["image"]: row["error"] for row in written["failed"]}
    assert failed.keys() == {str(photos / name) for name in (*bad, "float.tif", "thin.png")} | {str(missing)}
    assert (
        "No such file" in failed[str(missing)] and "one side is more than 50 times" in failed[str(photos / "thin.png")]
    )
    assert f"3 masks in {out}, 9 of 12 images failed" in capsys.readouterr().out


def test_files_that_are_all_missing_are_a_mistake(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UserError, match=r"x\.jpg: no such file or folder"):
        find_images([str(tmp_path / "x.jpg"), str(tmp_path / "y.jpg")])
    with pytest.raises(UserError, match="no such file or folder"):
        find_images(["x" * 300])
    assert len(find_images([str(tmp_path / "x.jpg"), str(photos)])) == 4


@pytest.mark.parametrize(
    "stem",
    ["x" * 251, "\u00e9" * 125 + "x", "\U0001f409" * 62, "-v", "--out", "con", "a:b?*", "[1]", " a ", "caf\udce9"],
)
def test_masks_have_the_names_of_their_images(tmp_path: Path, predictor: Predictor, photos: Path, stem: str) -> None:
    (photos / "a.png").rename(photos / f"{stem}.png")
    out, json_file = tmp_path / "out", tmp_path / "shares.json"
    assert not predict_files(predictor, [str(photos)], out, QUIET, overlays=True, json_file=json_file)
    assert {path.name for path in out.glob("*.png")} == {f"{stem}.png", "b.png", "c.png"}
    assert {path.name for path in out.glob("overlays/*")} == {f"{stem}.jpg", "b.jpg", "c.jpg"}
    assert {row["image"] for row in json.loads(json_file.read_text())["images"]} == {
        str(photos / name) for name in (f"{stem}.png", "b.jpg", "c.bmp")
    }
    with Image.open(out / f"{stem}.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), predictor.predict(photos / f"{stem}.png"))


@pytest.mark.parametrize("letter", ["x", "\u00e9"])
def test_numbered_names_fit_as_well(tmp_path: Path, letter: str) -> None:
    stem = letter * (251 // len(letter.encode()))
    targets = plan_targets([tmp_path / folder / f"{stem}.jpg" for folder in "abc"], tmp_path / "out", True)
    names = [target.mask.name for target in targets]
    assert len(set(names)) == 3 and names[0] == f"{stem}.png" and names[1].endswith(f"{letter}-2.png")
    assert all(250 <= len(name.encode()) <= 255 for name in names)
    for target in targets:
        target.mask.parent.mkdir(exist_ok=True)
        write_atomic(target.mask, b"mask")
        assert target.mask.read_bytes() == b"mask"
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_names_that_are_the_same_on_other_systems_are_numbered(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "caf\u00e9.jpg") for form in ("NFC", "NFD")]
    masks = [target.mask.name for target in plan_targets([Path(name) for name in names], tmp_path, False)]
    assert masks[0] == "caf\u00e9.png" and masks[1].endswith("-2.png")


def test_brackets_in_the_folder_of_a_pattern(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos.rename(tmp_path / "photos [2024]*")
    (tmp_path / "photos 2*").mkdir()
    assert [path.name for path in find_images([f"{folder}/*.[bj]*"])] == ["b.jpg", "c.bmp"]
    assert [path.name for path in find_images([f"{folder}/**/*.png"])] == ["a.png"]
    monkeypatch.chdir(tmp_path)
    assert find_images([f"{folder.name}/a.*"]) == [Path(folder.name) / "a.png"]
    monkeypatch.chdir(folder)
    assert find_images(["*.png"]) == find_images(["./*.png"]) == [Path("a.png")]


def test_results_inside_the_folder_of_photos_are_not_predicted_again(
    predictor: Predictor, photos: Path, capsys: pytest.CaptureFixture
) -> None:
    pattern, out = f"{photos}/**/*.*", photos / "found"
    for _ in range(2):
        assert not predict_files(predictor, [pattern], out, QUIET, overlays=True)
    assert sorted(path.name for path in out.rglob("*.*")) == ["a.jpg", "a.png", "b.jpg", "b.png", "c.jpg", "c.png"]
    assert "left out, as `starseg predict` wrote them" in capsys.readouterr().err
    own = out / "overlays" / "own.jpg"
    os.link(photos / "b.jpg", own)
    assert not predict_files(predictor, [pattern], out, QUIET)
    assert (out / "own.png").is_file() != (out / "b-2.png").is_file()
