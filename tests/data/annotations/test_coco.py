"""COCO files become masks; errors name the file and the annotation."""

import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as masks

from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.coco import read_coco
from starseg.errors import UserError

SIZE = (8, 10)
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "Dog"}, {"id": 90, "name": "cow"}]


def _box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _annotation(segmentation: Any, category: int = 7, **fields: Any) -> dict:
    return {"id": 5, "image_id": 1, "category_id": category, "segmentation": segmentation, **fields}


def _write(root: Path, *annotations: Any, **parts: Any) -> Path:
    """A COCO file of the images a.jpg (annotated) and sub/b.jpg, which are below root/images."""
    names = ["a.jpg", "sub/b.jpg"]
    images = [{"id": i, "file_name": n, "height": SIZE[0], "width": SIZE[1]} for i, n in enumerate(names, 1)]
    for name in names:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(root / "images" / name)
    tree = {"images": images, "annotations": list(annotations), "categories": CATEGORIES, **parts}
    (root / "instances.json").write_text(json.dumps(tree))
    return root / "instances.json"


def _draw(root: Path, *annotations: Any, classes: str = "dog,cat", **parts: Any) -> np.ndarray:
    """The mask of a.jpg."""
    coco = read_coco(_write(root, *annotations, **parts))
    return coco.photos(root / "images", read_classes(classes))[0].draw(SIZE)


def _runs(region: np.ndarray) -> list[int]:
    """Run lengths of a mask by columns, the background's first, as the format has them."""
    pixels = np.concatenate([[0], region.ravel(order="F"), [2]]).astype(int)
    edges = np.flatnonzero(np.diff(pixels)).tolist()
    return np.diff([0, *edges]).tolist()


def test_polygons_of_several_parts(tmp_path: Path) -> None:
    expected = np.zeros(SIZE, np.uint8)
    expected[1:3, 2:6] = expected[5:8, 7:10] = 2
    np.testing.assert_array_equal(_draw(tmp_path, _annotation([_box(2, 1, 6, 3), _box(7, 5, 10.4, 8)])), expected)


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_are_drawn_crowd_or_not(tmp_path: Path, compressed: bool) -> None:
    region = np.random.default_rng(0).integers(0, 2, SIZE, np.uint8)
    counts: Any = _runs(region)
    if compressed:
        counts = masks.encode(np.asfortranarray(region))["counts"].decode()
    for crowd in (0, 1):
        drawn = _draw(tmp_path, _annotation({"size": list(SIZE), "counts": counts}, iscrowd=crowd))
        np.testing.assert_array_equal(drawn, 2 * region)


def test_smaller_objects_cover_larger_ones_and_later_ones_equal_ones(tmp_path: Path) -> None:
    large, small = _annotation([_box(0, 0, 10, 8)]), _annotation([_box(1, 1, 3, 3)], 3)
    expected = np.full(SIZE, 2, np.uint8)
    expected[1:3, 1:3] = 1
    for order in ((large, small), (small, large)):
        np.testing.assert_array_equal(_draw(tmp_path, *order), expected)
    again = _annotation([_box(2, 1, 4, 3)])
    assert _draw(tmp_path, small, again)[1, 1:4].tolist() == [1, 2, 2]
    assert _draw(tmp_path, again, small)[1, 1:4].tolist() == [1, 1, 2]


def test_categories_are_classes_by_name(tmp_path: Path) -> None:
    cow = _annotation([_box(0, 0, 10, 8)], 90)
    path = _write(tmp_path, cow, _annotation([_box(1, 1, 3, 3)]))
    coco = read_coco(path)
    assert coco.classes.names == ("background", "cat", "cow")
    assert coco.left_out(read_classes("dog,CAT")) == ["cow"]
    drawn = _draw(tmp_path, cow, _annotation([_box(1, 1, 3, 3)]))
    assert drawn.sum() == 2 * 4, "a category that is no class is background"
    named = [{"id": 7, "name": "cat"}, {"id": 3, "name": "background"}]
    holes = [_annotation([_box(0, 0, 10, 8)]), _annotation([_box(1, 1, 3, 3)], 3)]
    assert (_draw(tmp_path, *holes, classes="cat", categories=named) == 0).sum() == 4


def test_images_without_annotations_are_background(tmp_path: Path) -> None:
    coco = read_coco(_write(tmp_path, _annotation([_box(0, 0, 4, 4)])))
    photos = coco.photos(tmp_path / "images", coco.classes)
    assert [photo.name for photo in photos] == ["a", "sub/b"]
    assert photos[0].draw(SIZE).any() and not photos[1].draw(SIZE).any()


RUNS = {"size": [8, 10], "counts": [3, 4, 73]}


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (_annotation([]), "has no polygon and no run lengths"),
        (_annotation(None), "has no polygon and no run lengths"),
        (_annotation([[1, 1, 4, 4]]), r"expected polygons \[x1, y1"),
        (_annotation([[1, 1, 4, 4, 5]]), r"expected polygons \[x1, y1"),
        (_annotation([1, 1, 4, 4, 5, 5]), r"expected polygons \[x1, y1"),
        (_annotation([[1, 1, 4, 4, 5, "x"]]), r"expected polygons \[x1, y1"),
        (_annotation([[1, 1, 4, 4, 5, float("nan")]]), r"expected polygons \[x1, y1"),
        (_annotation([_box(20, 1, 30, 8)]), r"its point 30, 1 is outside the image of 10x8"),
        (_annotation([_box(1, 1, 1e12, 8)]), r"its point 1e\+12, 1 is outside"),
        (_annotation([_box(-11, 1, 5, 8)]), r"its point -11, 1 is outside"),
        (_annotation([_box(1, 1, 10**400, 8)]), r"expected polygons \[x1, y1"),
        (
            _annotation({**RUNS, "size": [10, 8]}),
            r"its run lengths are of the size \[10, 8\] \(height, width\), its image is \[8, 10\]",
        ),
        (_annotation({"counts": [80]}), "its run lengths are of the size None"),
        (_annotation({**RUNS, "counts": [3, 4, 72]}), "its run lengths do not fill the image"),
        (_annotation({**RUNS, "counts": [3, 4, 7300]}), "its run lengths do not fill the image"),
        (_annotation({**RUNS, "counts": [-3, 10, 73]}), "its run lengths do not fill the image"),
        (_annotation({**RUNS, "counts": []}), "its run lengths do not fill the image"),
        (_annotation({**RUNS, "counts": None}), "its run lengths do not fill the image"),
        (_annotation({**RUNS, "counts": ""}), "its run lengths do not fill the image"),
        (_annotation({**RUNS, "counts": "34"}), "its run lengths do not fill the image"),
        (_annotation({**RUNS, "counts": "zzzzz~é"}), "its run lengths do not fill the image"),
        (_annotation([_box(1, 1, 4, 4)], image_id=4), "its image_id 4 is not in the file"),
        (_annotation([_box(1, 1, 4, 4)], category=1), "its category_id 1 is not in the file"),
    ],
)
def test_an_annotation_that_is_refused(tmp_path: Path, annotation: dict, message: str) -> None:
    with pytest.raises(UserError, match=rf"instances\.json: annotation 5: {message}"):
        _draw(tmp_path, annotation)


def _images(**fields: Any) -> dict[str, Any]:
    return {"images": [{"id": 1, "file_name": "a.jpg", **fields}]}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"images": None}, r"instances\.json: expected a COCO file .*; no images"),
        ({"categories": {}}, "no categories"),
        ({"annotations": [4]}, r"instances\.json: annotations\[0\]: expected id \(int\), image_id \(int\).*got 4"),
        ({"annotations": [{"id": 5, "image_id": 1}]}, r"annotations\[0\]: expected"),
        ({"categories": [*CATEGORIES, {"id": 8, "name": "CAT"}]}, "names a class twice: cat"),
        ({"categories": [*CATEGORIES, {"id": 7, "name": "hen"}]}, "categories: the id 7 is there twice"),
        (_images(file_name="b.jpg"), r"image 1: .*images/b\.jpg is missing, but .*sub/b\.jpg is there; 1 of 1 images"),
        (_images(file_name="none.jpg"), r"image 1: .*none\.jpg is missing; 1 of 1 images"),
        (_images(file_name="/etc/a.jpg"), r"image 1: expected a file_name below --images, got '/etc/a\.jpg'"),
        (_images(file_name="../a.jpg"), "image 1: expected a file_name below --images"),
        (_images(file_name=""), "image 1: expected a file_name below --images"),
        (_images(height=10, width=8), r"instances\.json: image 1 \(a\.jpg\): this mask is 8x10, its image 10x8 pixels"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, parts: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _draw(tmp_path, **{"classes": "cat", "annotations": [], **parts})


def test_classes_that_are_not_categories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--classes cat,hors: .*instances\.json has no category hors; it has cat, Dog"):
        _draw(tmp_path, classes="cat,hors")
    with pytest.raises(UserError, match="holds no annotation"):
        _ = read_coco(_write(tmp_path)).classes


def test_two_images_with_the_same_name(tmp_path: Path) -> None:
    path = _write(tmp_path)
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / "a.png")
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "images": [*tree["images"], {"id": 3, "file_name": "a.png"}]}))
    with pytest.raises(UserError, match=r"a\.png: a\.jpg has the same stem"):
        read_coco(path).photos(tmp_path / "images", read_classes("cat"))
    path.write_text(json.dumps({**tree, "images": [*tree["images"], {"id": 3, "file_name": "./a.jpg"}]}))
    with pytest.raises(
        UserError, match=r"images listed more than once: a\.jpg \(ids 1, 3\); give every file one entry"
    ):
        read_coco(path).photos(tmp_path / "images", read_classes("cat"))


def test_all_files_that_are_listed_twice_are_named_at_once(tmp_path: Path) -> None:
    path = _write(tmp_path)
    tree = json.loads(path.read_text())
    again = [{"id": number, "file_name": name} for number, name in ((9, "sub\\b.jpg"), (4, "a.jpg"), (8, "a.jpg"))]
    path.write_text(json.dumps({**tree, "images": [*tree["images"], *again]}))
    with pytest.raises(UserError, match=r"a\.jpg \(ids 1, 4, 8\), sub/b\.jpg \(ids 2, 9\); give every file"):
        read_coco(path).photos(tmp_path / "images", read_classes("cat"))


@pytest.mark.parametrize("write", [lambda path: path.write_text("{"), lambda path: path.write_bytes(b"\xff\xd8")])
def test_a_file_that_is_not_json(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    write(tmp_path / "masks.json")
    with pytest.raises(UserError, match=r"--masks .*masks\.json: expected a folder, or a COCO file"):
        read_coco(tmp_path / "masks.json")


def test_without_pycocotools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UserError, match=r"pip install 'starseg\[learn\]'"):
        read_coco(_write(tmp_path))


def test_polygons_that_end_a_few_pixels_outside_are_clipped(tmp_path: Path) -> None:
    expected = np.zeros(SIZE, np.uint8)
    expected[0:3, 6:] = expected[5:, 0:2] = 2
    beyond = [_box(6, -4, 10.6, 3), _box(-9.5, 5, 2, 12)]
    np.testing.assert_array_equal(_draw(tmp_path, _annotation(beyond)), expected)
    wide = np.zeros((8, 1000), np.uint8)
    wide[2:4, 900:] = 1
    row = {"id": 1, "file_name": "a.jpg"}
    path = _write(tmp_path, _annotation([_box(900, 2, 1049, 4)]), images=[row])
    coco = read_coco(path)
    photo = coco.photos(tmp_path / "images", coco.classes)[0]
    np.testing.assert_array_equal(photo.draw((8, 1000)), wide)
    with pytest.raises(UserError, match="its point 1049, 2 is outside the image of 990x8"):
        photo.draw((8, 990))


def test_an_unused_category_of_the_same_name_is_left_out(tmp_path: Path) -> None:
    """Roboflow writes one with the name of the project, which may be that of a class, in front."""
    categories = [{"id": 0, "name": "Cat", "supercategory": "none"}, {"id": 1, "name": "cat", "supercategory": "Cat"}]
    row = _annotation([_box(2, 1, 6, 3)], 1)
    coco = read_coco(_write(tmp_path, row, categories=categories))
    assert coco.classes.names == ("background", "cat")
    assert coco.photos(tmp_path / "images", coco.classes)[0].draw(SIZE).sum() == 8
    both = [row, _annotation([_box(2, 1, 6, 3)], 0)]
    with pytest.raises(UserError, match="names a class twice: cat"):
        read_coco(_write(tmp_path, *both, categories=categories))


def test_all_damaged_annotations_are_named_at_once(tmp_path: Path) -> None:
    rows = [{**_annotation([_box(1, 1, 4, 4)]), "id": number} for number in range(20)]
    for number in (3, 4, 7):
        rows[number]["segmentation"] = []
    with pytest.raises(UserError) as caught:
        _draw(tmp_path, *rows)
    lines = str(caught.value).split("\n  ")
    assert lines[0] == "3 annotations of a.jpg cannot be drawn:"
    assert [line.split("annotation ")[1].split(":")[0] for line in lines[1:]] == ["3", "4", "7"]
    for number in range(5, 19):
        rows[number]["category_id"] = 99
    with pytest.raises(UserError) as caught:
        _draw(tmp_path, *rows)
    lines = str(caught.value).split("\n  ")
    assert lines[0] == "14 annotations refer to entries that do not exist:" and lines[-1] == "and 4 more"
    assert "annotation 5: its category_id 99 is not in the file" in lines[1] and len(lines) == 12
    with pytest.raises(UserError, match=r"2 entries of images are incomplete:\n  .*images\[0\].*\n  .*images\[2\]"):
        _draw(tmp_path, images=[{"id": 1}, {"id": 2, "file_name": "a.jpg"}, {"id": None, "file_name": "x"}])


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_file_names_are_found_however_accents_are_stored(tmp_path: Path, listed: str, stored: str) -> None:
    names = {form: unicodedata.normalize(form, "caf\u00e9.jpg") for form in ("NFC", "NFD")}
    path = _write(tmp_path, _annotation([_box(2, 1, 6, 3)]), images=[{"id": 1, "file_name": names[listed]}])
    (tmp_path / "images" / "a.jpg").rename(tmp_path / "images" / names[stored])
    coco = read_coco(path)
    (photo,) = coco.photos(tmp_path / "images", coco.classes)
    assert photo.image.name == names[stored] and photo.name == "caf\u00e9" and photo.draw(SIZE).sum() == 8


def test_a_file_name_that_is_too_long_is_missing(tmp_path: Path) -> None:
    path = _write(tmp_path, _annotation([_box(2, 1, 6, 3)]), images=[{"id": 1, "file_name": "x" * 300 + ".jpg"}])
    with pytest.raises(UserError, match=r"x\.jpg is missing; 1 of 1 images are"):
        read_coco(path).photos(tmp_path / "images", read_classes("cat"))


def test_run_lengths_of_enormous_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its run lengths do not fill the image"):
        _draw(tmp_path, _annotation({"size": list(SIZE), "counts": "o" * 10**6 + "0"}))
