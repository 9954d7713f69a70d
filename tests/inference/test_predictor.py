"""Prediction: sizes, options, files, the command."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import starseg
from starseg.cli.main import main
from starseg.data.palette import voc_palette
from starseg.data.transforms import eval_transform as crop_transform
from starseg.errors import UserError
from starseg.inference.files import draw_overlay, find_images, plan_targets, predict_files
from starseg.inference.predictor import Predictor, fitted_size, load
from starseg.ops.bilinear import resize

QUIET = Console(quiet=True)


@pytest.fixture
def predictor(step_dir: Path) -> Predictor:
    return load(step_dir, "cpu")


def _array(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for name, size in (("a.png", (40, 60)), ("b.jpg", (90, 70)), ("sub/a.jpg", (64, 64))):
        Image.fromarray(_array(*size)).save(folder / name)
    (folder / "broken.jpg").write_bytes((folder / "b.jpg").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image")
    return folder


def test_a_crop_is_predicted_as_evaluation_predicts_it(predictor: Predictor) -> None:
    image = torch.from_numpy(_array(64, 64)).permute(2, 0, 1)
    cut, _ = crop_transform(image, image[:1], 64)
    with torch.inference_mode():
        logits = predictor.model(predictor.model.normalize(cut[None])).logits
        ids = predictor.rule(resize(logits, (64, 64)))[0]
    expected = np.array(predictor.dataset_ids)[ids]
    got = predictor.predict(_array(64, 64))
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("size", [(7, 9), (64, 64), (75, 300), (333, 200)])
@pytest.mark.parametrize("options", [{}, {"window": True}, {"flip": True, "scales": (0.75, 1.25)}])
def test_any_size_gives_a_mask_of_that_size(predictor: Predictor, size: tuple[int, int], options: dict) -> None:
    mask = predictor.predict(_array(*size), **options)
    assert mask.shape == size and mask.dtype == np.uint8
    assert set(np.unique(mask)) <= set(predictor.dataset_ids)


def test_files_pil_images_and_arrays_agree(predictor: Predictor, photos: Path) -> None:
    array = np.asarray(Image.open(photos / "a.png"))
    expected = predictor.predict(array)
    masks = predictor.predict([photos / "a.png", str(photos / "a.png"), Image.open(photos / "a.png")])
    for mask in masks:
        np.testing.assert_array_equal(mask, expected)


class _ArrayLike:
    """An array of another library: it has dimensions, iterates over its rows, and converts to NumPy."""

    def __init__(self, array: np.ndarray) -> None:
        self._array, self.ndim = array, array.ndim

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self._array)

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        return self._array


class _PathLike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_tensors_and_other_single_images_give_one_mask(predictor: Predictor, photos: Path) -> None:
    array = np.array(Image.open(photos / "a.png"))
    expected = predictor.predict(array)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for image in (tensor, _ArrayLike(array), _PathLike(photos / "a.png")):
        mask = predictor.predict(image)  # type: ignore[call-overload]
        assert isinstance(mask, np.ndarray)
        np.testing.assert_array_equal(mask, expected)
        (done,) = predictor.stream(image)  # type: ignore[arg-type]
        np.testing.assert_array_equal(done.mask, expected)
    assert [mask.tolist() for mask in predictor.predict([tensor, done.image])] == [expected.tolist()] * 2
    grey = predictor.predict(array[..., 0])
    np.testing.assert_array_equal(predictor.predict(tensor[:1]), grey)
    np.testing.assert_array_equal(predictor.predict(str(photos / "a.png")), expected)


def test_a_batch_of_mixed_sizes_changes_nothing_and_keeps_the_order(predictor: Predictor) -> None:
    images = [_array(*size, seed=i) for i, size in enumerate([(64, 64), (50, 80), (64, 64), (80, 50), (130, 130)])]
    together = predictor.predict(images, batch_size=3)
    for image, mask in zip(images, together, strict=True):
        single = predictor.predict(image, batch_size=1)
        assert mask.shape == single.shape and (mask == single).mean() > 0.999


def test_bands_of_rows_change_nothing(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = predictor.predict(_array(90, 70))
    monkeypatch.setattr("starseg.inference.predictor._MOST_LOGITS", 1000)
    assert (predictor.predict(_array(90, 70)) == whole).mean() > 0.999


def test_windows_give_what_the_whole_image_gives_for_a_translation_invariant_network(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every window's cells land where they belong, and overlaps are averaged, not added."""

    def means(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images.float(), 16) - 128

    monkeypatch.setattr(predictor, "logits", means)
    image = _array(128, 192)
    np.testing.assert_array_equal(predictor.predict(image, window=True), predictor.predict(image, scales=(2.0,)))


def test_flip_makes_the_prediction_mirror(predictor: Predictor) -> None:
    image = _array(64, 96)
    mirrored = predictor.predict(np.ascontiguousarray(image[:, ::-1]), flip=True)
    assert (mirrored[:, ::-1] == predictor.predict(image, flip=True)).mean() > 0.999


def test_fitted_sizes() -> None:
    assert fitted_size(375, 500, 192, 16) == (192, 256)
    assert fitted_size(500, 375, 192, 16) == (256, 192)
    assert fitted_size(10, 400, 64, 16) == (64, 2560)
    with pytest.raises(UserError, match="501x10 pixels: one side is more than 50 times"):
        fitted_size(10, 501, 64, 16)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), {}, r"uint8 \[H, W, 3\] or \[H, W\], got float32 \[4, 4, 3\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), {}, r"got uint8 \[2, 4, 4, 3\]"),
        (np.zeros((0, 4), np.uint8), {}, r"got uint8 \[0, 4\]"),
        ("nowhere.jpg", {}, "nowhere.jpg: cannot read this image"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}, r"uint8 \[3, H, W\] .*got .* \[2, 3, 4, 4\]; give"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), {}, r"an image tensor must be uint8 \[3, H, W\].*got .* \[4, 4, 3\]"),
        (torch.zeros(3, 4, 4), {}, r"an image tensor must be uint8 .*got torch.float32 \[3, 4, 4\]"),
        ([torch.zeros(3, 4, 3)], {}, "an image tensor must be uint8"),
        (b"a.png", {}, "images: expected a path, a PIL image, an array, a tensor, or a list of these, got bytes"),
        ({"a.png": 1}, {}, "images: expected .* got dict"),
        ({"a.png", "b.png"}, {}, "images: expected .* got set"),
        (None, {}, "images: expected .* got NoneType"),
        ([[[1, 2], [3]]], {}, r"images: list is no image .*an image array must be uint8"),
        (np.zeros((4, 4, 3), np.uint8), {"scales": ()}, "scales: expected numbers"),
        (np.zeros((4, 4, 3), np.uint8), {"batch_size": 0}, "batch_size: expected 1 or more"),
    ],
)
def test_mistakes_in_python(predictor: Predictor, image: object, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predictor.predict(image, **options)  # type: ignore[call-overload]


def test_load_reports_what_it_found_and_what_is_wrong(step_dir: Path) -> None:
    assert starseg.load(str(step_dir)).classes == ["background", "cat", "dog", "cow"]
    with pytest.raises(UserError, match="device: cannot use 'tpu9'"):
        load(step_dir, "tpu9")
    with pytest.raises(UserError, match=f"no step directory .*give one of its steps: {step_dir.name}"):
        load(step_dir.parent)
    with pytest.raises(UserError, match=f"no such folder; the steps of {step_dir.parent}: {step_dir.name}"):
        load(step_dir.parent / "step_9")
    info = json.loads((step_dir / "model.json").read_text())
    (step_dir / "model.json").write_text(json.dumps(info | {"method": "mine"}))
    with pytest.raises(UserError, match="method 'mine' of this step is not registered"):
        load(step_dir)


def test_find_images(photos: Path) -> None:
    assert [p.name for p in find_images([str(photos)])] == ["a.png", "b.jpg", "broken.jpg"]
    deep = find_images([f"{photos}/**/a.*", str(photos / "a.png")])
    assert [p.relative_to(photos).as_posix() for p in deep] == ["a.png", "sub/a.jpg"]
    (photos / "empty").mkdir()
    for text, message in (("no.jpg", "no such file"), ("*.nope", "no file matches"), ("empty", "no image in this")):
        with pytest.raises(UserError, match=message):
            find_images([str(photos / text)])


def test_files_that_are_not_read_are_named(photos: Path, capsys: pytest.CaptureFixture) -> None:
    (photos / ".DS_Store").touch()
    (photos / "sub" / "pal.gif").touch()
    find_images([str(photos)])
    assert capsys.readouterr().err == "note: 1 file is no image starseg reads: notes.txt\n"
    deep = find_images([f"{photos}/**/*"])
    assert [p.name for p in deep] == ["a.png", "b.jpg", "broken.jpg", "a.jpg"]
    assert capsys.readouterr().err == "note: 2 files are no images starseg reads: notes.txt, pal.gif\n"
    named = [photos / "a.png", photos / "sub" / "pal.gif"]
    assert find_images(list(map(str, named))) == named, "a file that is named itself is tried"
    with pytest.raises(UserError, match="no file matches this pattern that is an image"):
        find_images([f"{photos}/*.txt"])


def test_hidden_files_are_no_images_unless_named(photos: Path, capsys: pytest.CaptureFixture) -> None:
    expected = find_images([f"{photos}/**/*"])
    capsys.readouterr()
    for path in expected:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    assert find_images([f"{photos}/**/*"]) == expected
    assert find_images([str(photos)]) == [path for path in expected if path.parent == photos]
    with pytest.raises(UserError, match="no file matches this pattern that is an image"):
        find_images([f"{photos}/.*"])
    assert "._" not in capsys.readouterr().err
    assert find_images([str(photos / "._a.png")]) == [photos / "._a.png"]


def test_a_folder_of_folders_gets_advice_on_the_pattern(photos: Path) -> None:
    for file in photos.glob("*.*"):
        file.unlink()
    with pytest.raises(UserError, match="no image in this folder") as caught:
        find_images([str(photos)])
    (pattern,) = re.findall("'(.*)'", str(caught.value))
    assert pattern == f"{photos}/**/*" and [p.name for p in find_images([pattern])] == ["a.jpg"]


def test_images_with_the_same_stem_get_distinct_names(tmp_path: Path) -> None:
    images = [Path("x/a.jpg"), Path("x/A.png"), Path("y/a.jpg"), Path("y/a-2.jpg")]
    names = [t.mask.name for t in plan_targets(images, tmp_path, False)]
    assert names == ["a.png", "A-2.png", "a-3.png", "a-2-2.png"]


def test_an_image_is_never_overwritten(photos: Path, predictor: Predictor) -> None:
    before = (photos / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"--out: .*a\.png is one of the images and would be overwritten"):
        predict_files(predictor, [str(photos)], photos, QUIET)
    with pytest.raises(UserError, match=r"--json: .*a\.png is one of the images"):
        predict_files(predictor, [str(photos)], photos / "masks", QUIET, json_file=photos / "a.png")
    assert (photos / "a.png").read_bytes() == before


def test_a_mask_of_the_user_is_never_overwritten(tmp_path: Path, photos: Path, predictor: Predictor) -> None:
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(own / "a.png")
    before = (own / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"own/a\.png is there and was not made by `starseg predict`"):
        predict_files(predictor, [str(photos / "a.png")], own, QUIET)
    assert (own / "a.png").read_bytes() == before and len(list(own.iterdir())) == 1
    for _ in range(2):  # an earlier result is replaced
        assert not predict_files(predictor, [str(photos / "a.png")], out, QUIET, overlays=True)
    picture = out / "overlays" / "a.jpg"
    shutil.copy(photos / "b.jpg", picture)
    with pytest.raises(UserError, match=r"overlays/a\.jpg is there and was not made by `starseg predict`"):
        predict_files(predictor, [str(photos / "a.png")], out, QUIET, overlays=True)
    assert picture.read_bytes() == (photos / "b.jpg").read_bytes()


def test_masks_are_not_written_into_the_folder_of_photos(tmp_path: Path, photos: Path, predictor: Predictor) -> None:
    (tmp_path / "jpg").mkdir()
    Image.open(photos / "a.png").convert("RGB").save(tmp_path / "jpg" / "a.jpg")
    with pytest.raises(UserError, match="masks in it would pass for images"):
        predict_files(predictor, [str(tmp_path / "jpg")], tmp_path / "jpg", QUIET)


def test_overlay_tints_classes_and_names_them() -> None:
    image, mask = np.full((60, 80, 3), 100, np.uint8), np.zeros((60, 80), np.uint8)
    assert draw_overlay(image, mask, {}).size == (80, 60)
    mask[:30] = 8
    drawn = draw_overlay(image, mask, {8: "cat"})
    pixels = np.asarray(drawn)
    assert drawn.width == 80 and drawn.height > 60
    assert (pixels[40] == 100).all() and (pixels[5] == (100 + voc_palette()[8].astype(int)) // 2).all()
    assert (pixels[60:] == voc_palette()[8]).all(-1).any()


def test_predict_command(
    step_dir: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, figures = tmp_path / "out", tmp_path / "shares.json"
    args = ["predict", str(step_dir), str(photos), str(photos / "sub"), "--out", str(out), "--overlays"]
    monkeypatch.setattr(sys, "argv", ["starseg", *args, "--json", str(figures), "--scales", "0.5,1", "--flip"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert (
        "broken.jpg: cannot read this image" in printed and "3 masks" in printed and "1 of 4 images failed" in printed
    )
    assert sorted(p.name for p in out.glob("*.png")) == ["a-2.png", "a.png", "b.png"]
    assert len(list((out / "overlays").glob("*.jpg"))) == 3
    result = json.loads(figures.read_text())
    assert [Path(e["image"]).name for e in result["images"]] == ["a.png", "b.jpg", "a.jpg"]
    assert all(abs(sum(e["percent"].values()) - 100) < 1e-9 for e in result["images"])
    assert "broken.jpg" in result["failed"][0]["image"]
    with Image.open(out / "b.png") as mask:
        assert mask.mode == "P" and mask.size == (70, 90)
        assert set(np.unique(np.asarray(mask))) <= {0, 8, 10, 12}
        assert mask.getpalette()[: 3 * 13] == voc_palette()[:13].ravel().tolist()
