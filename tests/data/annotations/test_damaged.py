"""Annotation files of any content are read, or refused with a UserError.

By default a sample; `pytest -m slow tests/data/annotations/test_damaged.py` tries 2,000 files of each format.
"""

import base64
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.labelme import draw_labelme
from starseg.errors import UserError

SIZE = (8, 10)
TEXT = st.text(max_size=12) | st.sampled_from(
    ["cat", "a.jpg", "polygon", "mask", "circle", "\ud800", "\0", "x" * 300, "oo0"]
)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 8, 10, 10**400, 1e300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def _bitmap() -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ones((2, 3), np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


LABELME = {
    "imageHeight": SIZE[0],
    "imageWidth": SIZE[1],
    "shapes": [
        {"label": "cat", "shape_type": "polygon", "points": [[1, 1], [5, 1], [5, 4]]},
        {"label": "dog", "shape_type": "circle", "points": [[4, 4], [6, 4]]},
        {"label": "cat", "shape_type": "mask", "points": [[2, 2], [4, 3]], "mask": _bitmap()},
    ],
}
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": SIZE[0], "width": SIZE[1]}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 5, 1, 5, 4]]},
        {"id": 2, "image_id": 1, "category_id": 2, "segmentation": {"size": list(SIZE), "counts": [3, 4, 73]}},
        {"id": 3, "image_id": 1, "category_id": 2, "segmentation": {"size": list(SIZE), "counts": "34Y2"}},
    ],
}


def _places(tree: Any, path: tuple = ()) -> list[tuple]:
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in below for place in _places(value, (*path, key)))]


@st.composite
def _damaged(draw: st.DrawFn, tree: dict[str, Any]) -> str:
    """JSON of a valid tree in which one to three values are replaced, left out or repeated."""
    whole = {"": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        *parents, leaf = draw(st.sampled_from([place for place in _places(whole) if place]))
        owner: Any = whole
        for key in parents:
            owner = owner[key]
        change = draw(st.sampled_from(["replace", "leave out", "repeat"]))
        if change == "replace" or leaf == "":
            owner[leaf] = draw(VALUES)
        elif change == "leave out":
            del owner[leaf]
        elif isinstance(owner, list):
            owner.append(owner[leaf])
    return json.dumps(whole[""])


LABEL_MAPS = st.lists(
    st.text(alphabet="ab:,#0129\u0663 \t\r\x85\u2028", max_size=30)
    | st.sampled_from(["background:0,0,0::", "cat:1,2,3::", "# label:color_rgb:parts:actions", "a #c00080", "b 1 2 3"])
    | st.sampled_from([1, 3, 20, 5000]).map(lambda digits: f"n:{'9' * digits},1,2::"),
    max_size=5,
).map("\n".join)


def _read_labelme(folder: Path, text: str) -> None:
    (folder / "a.json").write_text(text)
    ids = draw_labelme(folder / "a.json", SIZE, ("background", "cat", "dog"))
    assert ids.shape == SIZE and set(np.unique(ids)) <= {0, 1, 2, 255}


def _read_coco(folder: Path, text: str) -> None:
    from starseg.data.annotations.coco import read_coco

    (folder / "coco.json").write_text(text)
    coco = read_coco(folder / "coco.json")
    for photo in coco.photos(folder / "images", coco.classes):
        ids = photo.draw(SIZE)
        assert ids.shape == SIZE and ids.max() < len(coco.classes.names)


def _read_label_map(folder: Path, text: str) -> None:
    (folder / "labelmap.txt").write_bytes(text.encode())
    classes = read_classes(str(folder / "labelmap.txt"))
    assert len(classes.names) > 1 and all(classes.names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "images").mkdir()
    Image.new("RGB", SIZE[::-1]).save(folder / "images" / "a.jpg")
    return folder


FORMATS = {
    "labelme": (_read_labelme, _damaged(LABELME), json.dumps(LABELME)),
    "coco": (_read_coco, _damaged(COCO), json.dumps(COCO)),
    "labelmap": (_read_label_map, LABEL_MAPS, "background:0,0,0::\ncat:1,2,3::\n"),
}


def _try(folder: Path, read: Callable[[Path, str], None], files: st.SearchStrategy[str], number: int) -> list[bool]:
    read_whole = []

    @settings(max_examples=number, deadline=None, derandomize=True)
    @given(files)
    def check(text: str) -> None:
        try:
            read(folder, text)
            read_whole.append(True)
        except UserError as error:
            assert str(folder) in str(error) or "--classes" in str(error), "the file is named"
            read_whole.append(False)

    check()
    return read_whole


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("number", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_files_of_any_content_are_read_or_refused(folder: Path, name: str, number: int) -> None:
    if name == "coco":
        pytest.importorskip("pycocotools")
    read, files, valid = FORMATS[name]
    read(folder, valid)
    outcomes = _try(folder, read, files, number)
    assert len(outcomes) >= number and True in outcomes and False in outcomes
