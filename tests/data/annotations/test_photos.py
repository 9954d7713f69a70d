"""Pairs of photos and masks: which file is the mask of which image."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starseg.data.annotations.classlist import ClassList, read_classes
from starseg.data.annotations.photos import Photo, pair_files
from starseg.errors import UserError

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
