"""Labelme files, and those that X-AnyLabeling writes in their format, become masks."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.labelme import draw_labelme
from starseg.errors import UserError

SIZE = (8, 12)
NAMES = ("background", "cat", "dog")


def _shape(points: Any, kind: str | None = "polygon", label: str = "cat", **fields: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, **fields}


def _draw(tmp_path: Path, *shapes: Any, **parts: Any) -> np.ndarray:
    tree = {"imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": list(shapes), **parts}
    (tmp_path / "a.json").write_text(json.dumps(tree))
    return draw_labelme(tmp_path / "a.json", SIZE, NAMES)


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _expected(rows: slice, columns: slice, index: int = 1) -> np.ndarray:
    ids = np.zeros(SIZE, np.uint8)
    ids[rows, columns] = index
    return ids


@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_a_mask_is_drawn_from_corner_to_corner(tmp_path: Path, dtype: type) -> None:
    """As Labelme's AI tools write it: a PNG of 0 and 1 in base64, and its first and last pixel."""
    bitmap = np.random.default_rng(0).integers(0, 2, (3, 5)).astype(dtype)
    expected = _expected(slice(0), slice(0))
    expected[2:5, 4:9] = bitmap
    drawn = _draw(tmp_path, _shape([[4.0, 2.0], [8.0, 4.0]], "mask", mask=_png(bitmap)))
    np.testing.assert_array_equal(drawn, expected)
    below = _shape([[0, 0], [11, 7]], "rectangle", "dog")
    drawn = _draw(tmp_path, below, _shape([[4, 2], [8, 4]], "mask", mask=_png(bitmap)))
    np.testing.assert_array_equal(drawn, np.where(expected, 1, 2))


def test_a_mask_that_ends_outside_is_clipped(tmp_path: Path) -> None:
    drawn = _draw(tmp_path, _shape([[10, 6], [13, 9]], "mask", mask=_png(np.ones((4, 4), np.uint8))))
    np.testing.assert_array_equal(drawn, _expected(slice(6, 8), slice(10, 12)))


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2]])
def test_a_rectangle_of_four_corners_equals_one_of_two(tmp_path: Path, order: list[int]) -> None:
    """X-AnyLabeling stores four."""
    corners = [[2.4, 1.6], [7.4, 1.6], [7.4, 5.6], [2.4, 5.6]]
    two = _draw(tmp_path, _shape([corners[0], corners[2]], "rectangle"))
    np.testing.assert_array_equal(_draw(tmp_path, _shape([corners[i] for i in order], "rectangle")), two)
    np.testing.assert_array_equal(
        _draw(tmp_path, _shape([[2, 1], [7, 5]], "rectangle")), _expected(np.s_[1:6], np.s_[2:8])
    )


@pytest.mark.parametrize("kind", ["rectangle", "rotation", "oriented_rectangle", "quadrilateral"])
def test_a_rotated_rectangle_is_its_outline(tmp_path: Path, kind: str) -> None:
    corners = [[5, 0], [9, 3], [6, 7], [2, 4]]
    np.testing.assert_array_equal(_draw(tmp_path, _shape(corners, kind)), _draw(tmp_path, _shape(corners)))


def test_outlines_that_end_outside_are_clipped(tmp_path: Path) -> None:
    drawn = _draw(tmp_path, _shape([[-3, -2], [4, -2], [4, 3], [-3, 3]]))
    np.testing.assert_array_equal(drawn, _expected(slice(0, 4), slice(0, 5)))
    drawn = _draw(tmp_path, _shape([[8, 5], [20, 15]], "rectangle"))
    np.testing.assert_array_equal(drawn, _expected(slice(5, 8), slice(8, 12)))


def test_labels_to_ignore_are_ignored(tmp_path: Path) -> None:
    drawn = _draw(tmp_path, _shape([[1, 1], [3, 3]], "rectangle", "__ignore__"))
    np.testing.assert_array_equal(drawn, _expected(slice(1, 4), slice(1, 4), 255))
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ncat\n")
    assert read_classes(str(tmp_path / "labels.txt")).names == ("_background_", "cat")


def test_a_shape_without_a_type_is_a_polygon(tmp_path: Path) -> None:
    corners = [[1, 1], [4, 1], [4, 3], [1, 3]]
    np.testing.assert_array_equal(_draw(tmp_path, _shape(corners, None)), _expected(slice(1, 4), slice(1, 5)))


SQUARE = [[1, 1], [4, 1], [4, 3], [1, 3]]
MASK = _png(np.ones((3, 4), np.uint8))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("x", "expected an object with label and points, got x"),
        ({"label": "cat"}, r"\(cat\): expected points \[\[x, y\], ...\], got None"),
        (_shape([[1, 2], [None, 3], [4, 5]]), "expected points"),
        (_shape([[1, 2], [3], [4, 5]]), "expected points"),
        (_shape([[1, 2, 3]] * 3), "expected points"),
        (_shape([[1, 2], [10**400, 3], [4, 5]]), "expected points"),
        (_shape([[1, 2], [float("inf"), 3], [4, 5]]), "expected points"),
        (_shape("abc"), "expected points"),
        (_shape([]), "expected points"),
        (_shape(SQUARE, label="cow"), "label 'cow' is none of the classes cat, dog; add it to --classes"),
        (_shape(SQUARE[:2]), "expected a polygon, rectangle, circle or mask, got polygon with 2 points"),
        (_shape(SQUARE[:1], "point"), "got point with 1 points; draw its outline, or take it out"),
        (_shape(SQUARE[:2], "line"), "got line with 2 points"),
        (_shape(SQUARE, {"a": 1}), "got {'a': 1} with 4 points"),
        (_shape([[20, 1], [23, 1], [23, 3]]), r"outside the image of 12x8 pixels \(x 20 to 23, y 1 to 3\)"),
        (_shape([[1, 1], [4, 1], [1e12, 3]]), "outside the image"),
        (_shape([[1, 1], [300, 1]], "circle"), "outside the image"),
        (_shape([[1, 1], [4, 3]], "mask"), "cannot read its mask, expected a PNG in base64"),
        (_shape([[1, 1], [4, 3]], "mask", mask="%%"), "cannot read its mask"),
        (_shape([[1, 1], [4, 3]], "mask", mask=MASK[:40]), "cannot read its mask"),
        (_shape([[1, 1], [5, 3]], "mask", mask=MASK), "must be a grey image of 5x3 pixels, .* got 4x3"),
        (_shape([[1, 1], [4, 3]], "mask", mask=_png(np.ones((3, 4, 3), np.uint8))), "must be a grey image"),
        (_shape(SQUARE, "mask", mask=MASK), "got mask with 4 points"),
    ],
)
def test_a_damaged_shape_is_named(tmp_path: Path, shape: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.json: shape 2.*{message}"):
        _draw(tmp_path, _shape(SQUARE), shape)


def test_all_damaged_shapes_are_named_at_once(tmp_path: Path) -> None:
    good = _shape(SQUARE)
    with pytest.raises(UserError) as caught:
        _draw(tmp_path, _shape(SQUARE[:1]), good, _shape(SQUARE, label="cow"), good, "x")
    lines = str(caught.value).split("\n  ")
    assert lines[0] == f"3 shapes of {tmp_path}/a.json cannot be drawn:" and len(lines) == 4
    assert [line.split(": ")[1].split(" (")[0] for line in lines[1:]] == ["shape 1", "shape 3", "shape 5"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"shapes": None}, "it has no list of shapes"),
        ({"shapes": {"a": 1}}, "it has no list of shapes"),
        ({"imageHeight": None, "imageWidth": None}, "its height and width are None and None"),
        ({"imageHeight": "8"}, "its height and width are 8 and 12"),
        ({"imageHeight": 9}, "this mask is 12x9, its image 12x8 pixels when upright"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.json: .*{message}"):
        _draw(tmp_path, _shape(SQUARE), **parts)
    for text in ("[]", "3", "{", ""):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(UserError, match=r"b\.json: expected a Labelme file"):
            draw_labelme(tmp_path / "b.json", SIZE, NAMES)
