"""Text files of one entry per line: only line breaks separate entries, and what is written reads back the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.labelme import draw_labelme
from starseg.data.datasets.base import read_lines
from starseg.data.datasets.folder import open_folder, write_list
from starseg.data.datasets.voc import open_voc
from starseg.data.images import read_mask
from starseg.errors import UserError
from starseg.finetuning.prepare import LearnRequest, prepare_step
from starseg.utils.files import split_lines, write_lines

SEPARATORS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


def test_only_line_breaks_end_a_line() -> None:
    assert split_lines("a\nb\r\nc\rd") == ["a", "b", "c", "d"]
    for separator in SEPARATORS:
        assert split_lines(f"a{separator}b\nc") == [f"a{separator}b", "c"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_lines_read_back_as_written(tmp_path: Path, separator: str) -> None:
    lines = ["background", f"traffic{separator}light", "dog"]
    write_lines(tmp_path / "classes.txt", lines)
    assert read_lines(tmp_path / "classes.txt", "") == lines
    pairs = [
        (tmp_path / f"a{separator}b.jpg", Path("masks") / f"a{separator}b.png"),
        (tmp_path / "c.jpg", Path("c.png")),
    ]
    for name in ("train.txt", "val.txt"):
        write_list(tmp_path / name, pairs)
    dataset = open_folder(tmp_path)
    assert dataset.names == tuple(lines)
    assert dataset.train.images == tuple(image for image, _ in pairs)
    assert dataset.test.masks == tuple(tmp_path / mask for _, mask in pairs)


@pytest.mark.parametrize("line", ["", "a\nb", "a\rb", " a", "a\u2028"])
def test_entries_that_would_not_read_back_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=r"classes\.txt: cannot write .* as a line; rename it"):
        write_lines(tmp_path / "classes.txt", ["background", line])
    assert not (tmp_path / "classes.txt").exists()


@pytest.mark.parametrize("separator", ["\t", "\n", "\r"])
def test_a_tab_or_line_break_in_a_path_is_refused(tmp_path: Path, separator: str) -> None:
    for pair in ((Path(f"a{separator}b.jpg"), Path("c.png")), (Path("a.jpg"), Path(f"{separator}/c.png"))):
        with pytest.raises(
            UserError, match=r"^'.*\\[tnr].*': a tab or line break in the name .* cannot be listed; rename"
        ):
            write_list(tmp_path / "train.txt", [(Path("x.jpg"), Path("x.png")), pair])
    assert not (tmp_path / "train.txt").exists()


@pytest.mark.parametrize("separator", [*SEPARATORS, "\n", "\r\n", "\t", "\u00a0", "  "])
def test_a_separator_in_a_category_does_not_shift_the_classes(tmp_path: Path, separator: str) -> None:
    pytest.importorskip("pycocotools")
    names = [f"traffic{separator}light", f"dog{separator}"]
    images = [{"id": i, "file_name": f"{i}.png", "width": 40, "height": 20} for i in range(3)]
    boxes = [[[2, 2, 12, 2, 12, 8, 2, 8]], [[20, 4, 25, 4, 25, 9, 20, 9]]]
    annotations = [
        {"id": 2 * i + k, "image_id": i, "category_id": k + 1, "segmentation": boxes[k]}
        for i in range(3)
        for k in range(2)
    ]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    for image in images:
        Image.new("RGB", (40, 20)).save(tmp_path / image["file_name"])
    coco = tmp_path / "coco.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    for given in (None, "traffic light,dog"):
        out = tmp_path / f"prepared {given}"
        prepare_step(LearnRequest(None, tmp_path, coco, given, out), None, out, Console(quiet=True))
        dataset = open_folder(out)
        assert dataset.names == ("background", "traffic light", "dog")
        counts = np.bincount(read_mask(dataset.train.masks[0]).ravel(), minlength=3)
        assert counts[1:].tolist() == [60, 25]


def test_an_empty_category_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    from starseg.data.annotations.coco import read_coco

    categories = [{"id": 1, "name": "\u2028 "}, {"id": 2, "name": "dog"}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    with pytest.raises(UserError, match=r"coco\.json: categories: the name of id 1 is empty"):
        read_coco(tmp_path / "coco.json")


@pytest.mark.parametrize("separator", [*SEPARATORS, "\u00a0"])
def test_class_lists_and_labels_agree_on_names(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_text(f"background\ntraffic{separator}light\ndog\n", encoding="utf-8")
    names = read_classes(str(path)).names
    assert names == ("background", "traffic light", "dog")
    path.write_text(f"background:0,0,0::\ntraffic{separator}light:1,2,3::\ndog:4,5,6::\n", encoding="utf-8")
    assert read_classes(str(path)).names == names
    shapes = [{"label": f"traffic{separator}light", "points": [[1, 1], [4, 1], [4, 3], [1, 3]]}]
    label = tmp_path / "a.json"
    label.write_text(json.dumps({"imageHeight": 8, "imageWidth": 8, "shapes": shapes}))
    assert np.bincount(draw_labelme(label, (8, 8), names).ravel()).tolist() == [52, 12]


@pytest.mark.parametrize("separator", ["\u00a0", "\u2028", "\x85", "\u3000"])
def test_names_in_voc_lists_are_split_at_blanks_and_tabs_only(tmp_path: Path, separator: str) -> None:
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train_aug.txt").write_text(f"/I/a{separator}1.jpg  \t/M/a{separator}1.png\r\n", encoding="utf-8")
    (lists / "val.txt").write_text(f"b{separator}2\rc\n", encoding="utf-8")
    dataset = open_voc(tmp_path)
    assert dataset.train.images == (tmp_path / f"I/a{separator}1.jpg",)
    assert dataset.test.images == (tmp_path / f"JPEGImages/b{separator}2.jpg", tmp_path / "JPEGImages/c.jpg")
