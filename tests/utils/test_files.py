"""Text and JSON of users are read in every encoding that a byte order mark announces."""

import json
from pathlib import Path

import pytest

from starseg.compat.settings import read_published
from starseg.config import load_config
from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.coco import read_coco
from starseg.data.annotations.labelme import draw_labelme
from starseg.data.datasets.base import read_lines
from starseg.errors import UserError
from starseg.utils.files import parse_json, read_json, read_text

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


def _write(path: Path, text: str, encoding: str) -> Path:
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16-be with mark", "utf-32-be with mark"])
def test_every_reader_takes_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    mark = "\ufeff" if "mark" in encoding else ""
    encoding = encoding.split()[0]

    def write(name: str, text: str) -> Path:
        return _write(tmp_path / name, mark + text, encoding)

    polygon = {"label": "kůň", "points": [[0, 0], [3, 0], [3, 3], [0, 3]]}
    labelme = write("a.json", json.dumps({"shapes": [polygon], "imageHeight": 4, "imageWidth": 4}, ensure_ascii=False))
    assert draw_labelme(labelme, (4, 4), ["background", "kůň"]).all()
    category = {"id": 7, "name": "kůň"}
    coco = {"images": [], "categories": [category], "annotations": []}
    assert read_coco(write("coco.json", json.dumps(coco, ensure_ascii=False))).categories == {7: "kůň"}
    assert read_classes(str(write("classes.txt", "background\r\nkůň\r\n"))).names == ("background", "kůň")
    label_map = write("labelmap.txt", "kůň:1,2,3::\nbackground:0,0,0::\n")
    assert read_classes(str(label_map)).colours == ((0, 0, 0), (1, 2, 3))
    assert read_lines(write("val.txt", "a b\n\nc\n"), "") == ["a b", "c"]
    assert load_config(write("c.yaml", "seed: 5\ntask: {steps: [[cat]]}\n")).seed == 5
    assert read_published(write("config.json", '{"name": "kůň"}')) == {"name": "kůň"}
    assert read_json(tmp_path / "config.json") == {"name": "kůň"}


def test_text_without_a_mark_must_be_utf8(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "café", "latin-1")
    with pytest.raises(UnicodeDecodeError):
        read_text(path)
    assert read_text(path, errors="surrogateescape").encode(errors="surrogateescape") == "café".encode("latin-1")
    assert read_text(_write(tmp_path / "empty.txt", "", "utf-8")) == ""


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "", "{", "9" * 5000])
def test_json_that_cannot_be_parsed_is_a_value_error(tmp_path: Path, text: str) -> None:
    path = _write(tmp_path / "a.json", text, "utf-8")
    with pytest.raises(ValueError):
        parse_json(path)
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(path)
