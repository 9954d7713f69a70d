"""Pairs of photos and masks: which file is the mask of which image."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from starseg.data.annotations.classlist import ClassList, read_classes
from starseg.data.annotations.photos import Photo, convert_masks, pair_files, read_indices
from starseg.data.images import read_mask
from starseg.errors import UserError
from starseg.inference.files import mask_png

SIZE = (20, 30)


@pytest.fixture
def classes() -> ClassList:
    return read_classes("cat")


def _photo(path: Path, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def _labelme(path: Path) -> Path:
    """A cat of 11 x 6 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"label": "cat", "shape_type": "rectangle", "points": [[5, 4], [15, 9]]}
    path.write_text(json.dumps({"imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": [shape]}))
    return path


def _mask(path: Path) -> Path:
    """A cat of 7 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.zeros(SIZE, np.uint8)
    ids[3, :7] = 1
    Image.fromarray(ids).save(path)
    return path


def _pixels(photos: list[Photo]) -> list[int]:
    return [int((photo.draw(SIZE) == 1).sum()) for photo in photos]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_photo_is_never_its_own_mask(tmp_path: Path, classes: ClassList, mode: str) -> None:
    for stem in "ab":
        _photo(tmp_path / f"{stem}.png", mode)
        _labelme(tmp_path / f"{stem}.json")
    photos = pair_files(tmp_path, tmp_path, classes)
    assert [p.mask for p in photos] == [tmp_path / "a.json", tmp_path / "b.json"] and _pixels(photos) == [66, 66]
    (tmp_path / "b.json").unlink()
    with pytest.raises(UserError, match=r"b: no mask .*b\.png \(nor \.json\); 1 of 2 images have none"):
        pair_files(tmp_path, tmp_path, classes)


@pytest.mark.parametrize("link", [os.symlink, os.link, shutil.copy])
def test_nor_in_another_folder(tmp_path: Path, classes: ClassList, link: Callable[[Path, Path], None]) -> None:
    photo = _photo(tmp_path / "photos" / "a.png", "L")
    mask = _labelme(tmp_path / "masks" / "a.json")
    link(photo, tmp_path / "masks" / "a.png")
    photos = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    assert [p.mask for p in photos] == [mask]
    mask.unlink()
    with pytest.raises(UserError, match="1 of 1 images have none"):
        pair_files(tmp_path / "photos", tmp_path / "masks", classes)


def test_two_masks_of_an_image_are_refused(tmp_path: Path, classes: ClassList) -> None:
    _photo(tmp_path / "photos" / "a.jpg")
    first, second = _labelme(tmp_path / "masks" / "a.json"), _mask(tmp_path / "masks" / "a.png")
    with pytest.raises(UserError, match=r"photos/a\.jpg: .*a\.json and .*a\.png could both be its mask"):
        pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    second.rename(tmp_path / "masks" / "a.JSON")
    with pytest.raises(UserError, match=r"a\.JSON and .*a\.json could both be its mask"):
        pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    first.unlink()
    (tmp_path / "masks" / "a.JSON").rename(second)
    assert _pixels(pair_files(tmp_path / "photos", tmp_path / "masks", classes)) == [7]


def test_masks_linked_into_the_folder_of_images_are_not_images(tmp_path: Path, classes: ClassList) -> None:
    _photo(tmp_path / "photos" / "a.jpg")
    _mask(tmp_path / "masks" / "a.png")
    (tmp_path / "photos" / "labels").symlink_to(tmp_path / "masks")
    photos = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    assert [p.name for p in photos] == ["a"] and _pixels(photos) == [7]


def test_linked_folders_are_paired(tmp_path: Path, classes: ClassList) -> None:
    _photo(tmp_path / "disk" / "photos" / "a.jpg")
    _mask(tmp_path / "disk" / "masks" / "a.png")
    for kind in ("photos", "masks"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "monday").symlink_to(tmp_path / "disk" / kind)
    photos = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    assert [p.name for p in photos] == ["monday/a"] and _pixels(photos) == [7]


def test_what_is_not_used_is_named(tmp_path: Path, classes: ClassList, capsys: pytest.CaptureFixture) -> None:
    photo = _photo(tmp_path / "photos" / "a.jpg")
    (tmp_path / "photos" / "b.jpg").symlink_to(photo)
    for stem in "abc":
        _mask(tmp_path / "masks" / f"{stem}.png")
    pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    err = capsys.readouterr().err
    assert f"masks without an image of the same name are not used: {tmp_path}/masks/c.png" in err
    assert f"the same image count twice, perhaps in training and validation: {tmp_path}/photos/b.jpg is {photo}" in err


def test_images_that_a_coco_file_does_not_list_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("pycocotools")
    from starseg.data.annotations.coco import read_coco

    for stem in "ab":
        _photo(tmp_path / "photos" / f"{stem}.jpg")
    row = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[5, 4, 15, 4, 15, 9, 5, 9]]}
    image, category = {"id": 1, "file_name": "a.jpg"}, {"id": 1, "name": "cat"}
    file = tmp_path / "coco.json"
    file.write_text(json.dumps({"images": [image], "categories": [category], "annotations": [row]}))
    coco = read_coco(file)
    assert [photo.name for photo in coco.photos(tmp_path / "photos", coco.classes)] == ["a"]
    assert f"coco.json does not list are not used: {tmp_path}/photos/b.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(("image_form", "mask_form"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_are_stored_in_one_character_or_two(
    tmp_path: Path, classes: ClassList, image_form: str, mask_form: str
) -> None:
    """macOS unpacks archives with two."""
    name = "S\u00e3o/caf\u00e9"
    image = _photo(tmp_path / "photos" / unicodedata.normalize(image_form, f"{name}.jpg"))
    _mask(tmp_path / "masks" / unicodedata.normalize(mask_form, f"{name}.png"))
    (photo,) = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    assert photo.image == image and photo.name == name and _pixels([photo]) == [7]
    _photo(tmp_path / "photos" / unicodedata.normalize(mask_form, f"{name}.jpg"))
    with pytest.raises(UserError, match="has the same stem, so both have one mask"):
        pair_files(tmp_path / "photos", tmp_path / "masks", classes)


def test_accents_in_class_names_and_labels(tmp_path: Path) -> None:
    shape = {"label": unicodedata.normalize("NFD", "caf\u00e9"), "points": [[1, 1], [4, 1], [4, 3], [1, 3]]}
    (tmp_path / "a.json").write_text(json.dumps({"imageHeight": 8, "imageWidth": 8, "shapes": [shape]}))
    classes = read_classes("caf\u00e9,dog")
    assert (read_indices(tmp_path / "a.json", (8, 8), classes) == 1).sum() == 12
    assert read_classes(unicodedata.normalize("NFD", "caf\u00e9,dog")).names == classes.names


@pytest.mark.parametrize("stem", ["-x", "--out", "x" * 251, "\u00e9" * 125, "con", "a:b*?", "[1]", " a", "a.b"])
def test_awkward_names_are_paired(tmp_path: Path, classes: ClassList, stem: str) -> None:
    image = _photo(tmp_path / "photos" / f"{stem}.jpg")
    _mask(tmp_path / "masks" / f"{stem}.png")
    (photo,) = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    assert photo.image == image and photo.name == stem and _pixels([photo]) == [7]
    convert_masks([photo], np.arange(256, dtype=np.uint8), tmp_path / "run", Console(quiet=True))
    assert (read_mask(tmp_path / "run" / f"{stem}.png") == 1).sum() == 7


@pytest.mark.parametrize("suffix", ["bmp", "tif", "jpg"])
def test_masks_in_other_formats(tmp_path: Path, classes: ClassList, suffix: str) -> None:
    for stem in "ab":
        _photo(tmp_path / "photos" / f"{stem}.jpg")
    ids = np.zeros(SIZE, np.uint8)
    ids[8:16, 8:24] = 1
    options = {"quality": 100} if suffix == "jpg" else {}
    Image.fromarray(ids).save(tmp_path / f"a.{suffix}", **options)
    for stem in "ab":
        (tmp_path / "masks").mkdir(exist_ok=True)
        shutil.copy(tmp_path / f"a.{suffix}", tmp_path / "masks" / f"{stem}.{suffix}")
    photos = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    assert _pixels(photos) == [128, 128]
    _mask(tmp_path / "masks" / "b.png")
    photos = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    assert _pixels(photos) == [128, 7], "a PNG is the mask, a preview beside it is not"


def test_jpeg_masks_by_colour(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8, 8:] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    assert (read_indices(tmp_path / "a.jpg", (16, 16), read_classes("background #000000,cat #ffffff")) == 1).sum() == 64
    y, x = np.mgrid[:96, :96]
    near = (np.hypot(y - 40, x - 40) < 30).astype(np.uint8)
    Image.fromarray(np.stack([near] * 3, -1)).save(tmp_path / "b.jpg", quality=75)
    with Image.open(tmp_path / "b.jpg") as image:
        changed = np.asarray(image)[..., 0]
    assert set(np.unique(changed)) == {0, 1, 2} and (changed != near).any(), "known colours, but elsewhere"
    with pytest.raises(UserError, match=r"b\.jpg: JPEG compression may turn one colour of .* two are only 1 apart"):
        read_indices(tmp_path / "b.jpg", (96, 96), read_classes("background 0 0 0,cat 1 1 1,dog 2 2 2"))


def test_runs_and_predictions_among_the_photos_are_no_photos(
    tmp_path: Path, classes: ClassList, capsys: pytest.CaptureFixture
) -> None:
    _photo(tmp_path / "a.jpg")
    _mask(tmp_path / "masks" / "a.png")
    made = {
        "run": ["config.yaml", ".lock", "learn/masks/a.png"],
        "begun": ["learn/learn.json", "learn/masks/a.png"],
        "prepared": ["learn.json", "classes.txt", "train.txt", "masks/a.png"],
        "report": ["report.html", "iou.png"],
        "old run": ["config.yaml", "step_0/x.png"],
    }
    for folder, files in made.items():
        for file in files:
            (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / file).write_bytes((tmp_path / "masks" / "a.png").read_bytes())
    (tmp_path / "found" / "overlays").mkdir(parents=True)
    (tmp_path / "found" / "a.png").write_bytes(mask_png(np.zeros(SIZE, np.uint8)))
    with Image.open(tmp_path / "a.jpg") as image:
        image.save(tmp_path / "found" / "overlays" / "a.jpg", comment="starseg")
    photos = pair_files(tmp_path, tmp_path / "masks", classes)
    assert [photo.name for photo in photos] == ["a"] and _pixels(photos) == [7]
    err = capsys.readouterr().err
    assert "left out, as starseg made them: " + ", ".join(str(tmp_path / name) for name in sorted(made)) in err
    assert f"`starseg predict` wrote them: {tmp_path}/found/a.png, {tmp_path}/found/overlays/a.jpg" in err
    _photo(tmp_path / "found" / "own.jpg")
    with pytest.raises(UserError, match=r"found/own: no mask .*own\.png .*1 of 2 images have none"):
        pair_files(tmp_path, tmp_path / "masks", classes)


def test_masks_of_other_names_are_named(tmp_path: Path, classes: ClassList) -> None:
    _photo(tmp_path / "photos" / "a.jpg")
    mask = _mask(tmp_path / "masks" / "a_mask.png")
    with pytest.raises(UserError, match=f"1 of 1 images have none: .*; these have names of no image: {mask}$"):
        pair_files(tmp_path / "photos", tmp_path / "masks", classes)


def test_all_masks_that_cannot_be_used_are_named_at_once(tmp_path: Path, classes: ClassList) -> None:
    for stem in "abcd":
        _photo(tmp_path / "photos" / f"{stem}.jpg")
        _mask(tmp_path / "masks" / f"{stem}.png")
    Image.new("L", (9, 9)).save(tmp_path / "masks" / "a.png")
    (tmp_path / "photos" / "b.jpg").write_bytes(b"x")
    Image.new("L", SIZE[::-1], 5).save(tmp_path / "masks" / "d.png")
    photos = pair_files(tmp_path / "photos", tmp_path / "masks", classes)
    with pytest.raises(UserError) as caught:
        convert_masks(photos, np.arange(256, dtype=np.uint8), tmp_path / "out", Console(quiet=True))
    first, *lines = str(caught.value).split("\n  ")
    assert first == "3 photos cannot be used:" and len(lines) == 3
    for line, text in zip(
        lines, ["masks/a.png: this mask is 9x9", "masks/d.png: indices [5]", "photos/b.jpg: cannot"], strict=True
    ):
        assert line.startswith(f"{tmp_path}/{text}")
