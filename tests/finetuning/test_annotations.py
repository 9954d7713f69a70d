"""`starseg learn` reads CVAT's exports "COCO 1.0" and "Segmentation mask 1.1"."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from commands import command
from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.photos import pair_files
from starseg.data.images import read_mask
from starseg.engine.checkpoint import load_info
from starseg.errors import UserError
from starseg.finetuning.prepare import LearnRequest, prepare_step

COLOURS = {"Airship": (250, 50, 83), "cat": (51, 221, 255), "horse": (61, 61, 245)}
SIDE = 48
# Boxes x0, y0, x1, y1 of each image; "bare" has none.
DRAWN = {
    **{f"day 1/{i}": {"cat": (4, 6, 30, 40), "horse": (10 + i, 10, 20 + i, 20)} for i in range(4)},
    **{f"day 2/{i}": {"horse": (8, 4, 40 - i, 28), "Airship": (30, 30, 46, 46)} for i in range(4)},
    "bare": {},
}
LABEL_MAP = """# label:color_rgb:parts:actions
Airship:250,50,83::
background:0,0,0::
cat:51,221,255::
horse:61,61,245::
"""


def _photos(folder: Path) -> Path:
    """The images, in folders as in the task."""
    for number, (name, boxes) in enumerate(DRAWN.items()):
        pixels = np.random.default_rng(number).integers(0, 90, (SIDE, SIDE, 3), np.uint8)
        for label, (x0, y0, x1, y1) in boxes.items():
            pixels[y0:y1, x0:x1] = COLOURS[label]
        path = folder / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def segmentation_mask(tmp_path: Path) -> Path:
    """A "Segmentation mask 1.1" archive: masks in colours of the label map, none where nothing is annotated."""
    root = tmp_path / "task_segmentation_mask"
    _photos(root / "JPEGImages")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "default.txt").write_text("".join(f"{name}\n" for name in DRAWN))
    (root / "labelmap.txt").write_text(LABEL_MAP)
    for name, boxes in DRAWN.items():
        pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
        for label, (x0, y0, x1, y1) in boxes.items():
            pixels[y0:y1, x0:x1] = COLOURS[label]
        for kind in ("SegmentationClass", "SegmentationObject") if boxes else ():
            path = root / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A "COCO 1.0" archive: a cat is a polygon, the rest is painted with the brush, which CVAT writes as a crowd."""
    root = tmp_path / "task_coco"
    _photos(root / "images" / "default")
    numbers = {name: number for number, name in enumerate(COLOURS, 1)}
    images, annotations = [], []
    for number, (name, boxes) in enumerate(DRAWN.items(), 1):
        rest = {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
        images.append({"id": number, "width": SIDE, "height": SIDE, "file_name": f"{name}.jpg", **rest})
        for label, (x0, y0, x1, y1) in boxes.items():
            painted = np.zeros((SIDE, SIDE), bool)
            painted[y0:y1, x0:x1] = True
            edges = np.flatnonzero(np.diff(np.concatenate([[False], painted.ravel(order="F")])))
            counts = np.diff([0, *edges, SIDE * SIDE]).tolist()
            brush = {"counts": counts, "size": [SIDE, SIDE]}
            outline = [[float(v) for v in (x0, y0, x1, y0, x1, y1, x0, y1)]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": numbers[label],
                    "segmentation": outline if label == "cat" else brush,
                    "area": float(painted.sum()),
                    "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                    "iscrowd": int(label != "cat"),
                    "attributes": {"occluded": False},
                }
            )
    categories = [{"id": number, "name": name, "supercategory": ""} for name, number in numbers.items()]
    tree = {"licenses": [{"name": "", "id": 0, "url": ""}], "info": {}, "categories": categories}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_default.json").write_text(
        json.dumps({**tree, "images": images, "annotations": annotations})
    )
    return root


def _masks(folder: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(folder).as_posix(): read_mask(p) for p in sorted(folder.rglob("*.png"))}


def test_both_exports_give_the_same_masks(segmentation_mask: Path, coco: Path, tmp_path: Path) -> None:
    root, quiet = segmentation_mask, Console(quiet=True)
    by_colour = LearnRequest(
        None, root / "JPEGImages", root / "SegmentationClass", str(root / "labelmap.txt"), tmp_path
    )
    first = prepare_step(by_colour, None, tmp_path / "first", quiet)
    file = coco / "annotations" / "instances_default.json"
    second = prepare_step(
        LearnRequest(None, coco / "images" / "default", file, None, tmp_path), None, tmp_path / "second", quiet
    )
    assert first.names == second.names == ("background", "Airship", "cat", "horse")
    one, other = _masks(tmp_path / "first" / "masks"), _masks(tmp_path / "second" / "masks")
    assert list(one) == list(other) == sorted(f"{name}.png" for name in DRAWN)
    for name, mask in one.items():
        np.testing.assert_array_equal(mask, other[name])
    assert not one["bare.png"].any() and set(np.unique(one["day 1/0.png"])) == {0, 2, 3}
    np.testing.assert_array_equal(first.val, second.val)


@pytest.mark.slow
def test_a_step_learnt_from_coco_is_a_step_like_any_other(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    images, file = coco / "images" / "default", coco / "annotations" / "instances_default.json"
    new = ["--new", "--backbone", "test_resnet", "--pretrained", "no", "--crop", 48, "--epochs", 2]
    source = ["--images", images, "--masks", file]
    assert command(monkeypatch, "learn", *new, *source, "--classes", "cat,airship", "--out", tmp_path / "a") == 0
    assert "annotations of horse count as background" in capsys.readouterr().out
    step = tmp_path / "a" / "step_0"
    args = [*source, "--epochs", 1, "--out", tmp_path / "b"]
    assert command(monkeypatch, "learn", step, *args, "--dry-run") == 0 and not (tmp_path / "b").exists()
    assert command(monkeypatch, "learn", step, *args) == 0, capsys.readouterr().err
    assert "horse (new)" in capsys.readouterr().out
    learnt = tmp_path / "b" / "step_1"
    assert load_info(learnt).names == ["background", "cat", "airship", "horse"]
    assert command(monkeypatch, "predict", learnt, f"{images}/**/*.jpg", "--out", tmp_path / "m", "--overlays") == 0
    assert len(list((tmp_path / "m").glob("*.png"))) == len(list((tmp_path / "m" / "overlays").iterdir())) == len(DRAWN)
    assert command(monkeypatch, "eval", learnt) == 0
    assert command(monkeypatch, "report", tmp_path / "b", "--out", tmp_path / "report") == 0
    assert command(monkeypatch, "export", learnt, "--out", tmp_path / "model.onnx") == 0
    assert "masks agree" in capsys.readouterr().out


def test_label_maps(tmp_path: Path) -> None:
    path = tmp_path / "labelmap.txt"
    path.write_text("# label:color_rgb:parts:actions\nred fox:1,2,3:head,tail:run\n")
    classes = read_classes(str(path))
    assert classes.names == ("background", "red fox") and classes.colours == ((0, 0, 0), (1, 2, 3))
    path.write_text("ant:0,0,7::\nbackground:9,9,9::\nbee:1,2,3::\n")
    classes = read_classes(str(path))
    assert classes.names == ("background", "ant", "bee") and classes.colours[0] == (9, 9, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("background:0,0,0::\ncat:1,2,3::\ndog\n", r"expected 'name:R,G,B:parts:actions' .* got 'dog'"),
        ("background:0,0,0::\ncat:1,2,300::\n", "from 0 to 255, got 'cat:1,2,300::'"),
        ("cat:0,0,0::\n", "two classes have the same colour"),
        ("background:0,0,0::\n", "at least one class beside"),
    ],
)
def test_label_maps_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labelmap.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_classes(str(tmp_path / "labelmap.txt"))


def test_only_a_label_map_lets_masks_be_absent(segmentation_mask: Path) -> None:
    root = segmentation_mask
    classes = read_classes("Airship #fa3253,cat #33ddff,horse #3d3df5")
    with pytest.raises(UserError, match=r"JPEGImages/bare: no mask .*bare\.png \(nor .*; 1 of 9 images have none"):
        pair_files(root / "JPEGImages", root / "SegmentationClass", classes)
    with pytest.raises(UserError, match="9 of 9 images have none"):
        pair_files(root / "JPEGImages", root / "ImageSets", read_classes(str(root / "labelmap.txt")))


def test_images_are_found_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/1.jpg", "b/1.jpg", ".thumbs/1.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "masks" / name)
    monkeypatch.chdir(tmp_path)
    for images, masks in ((tmp_path, tmp_path / "masks"), (Path(), tmp_path / "masks"), (tmp_path, Path("masks"))):
        photos = pair_files(images, masks, read_classes("cat"))
        assert [(p.name, p.mask) for p in photos] == [(n, masks / f"{n}.png") for n in ("a/1", "b/1")]


def test_classes_are_needed_without_coco(
    segmentation_mask: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = segmentation_mask
    args = ["--images", root / "JPEGImages", "--masks", root / "SegmentationClass", "--out", tmp_path / "run"]
    assert command(monkeypatch, "learn", "--new", "--pretrained", "no", *args) == 2
    assert "--classes: give a file or names" in capsys.readouterr().err and not (tmp_path / "run").exists()


def _change(key: str, value: object) -> Callable[[dict], None]:
    """Changes the tenth annotation."""
    return lambda tree: tree["annotations"][9].update({key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change("segmentation", []), "annotation 10: has no polygon and no run lengths (a box?)"),
        (
            _change("segmentation", [[1, 1, 5, 1, 99, 9]]),
            "annotation 10: its point 99, 9 is outside the image",
        ),
        (_change("segmentation", {"size": [48, 48], "counts": [7]}), "annotation 10: its run lengths do not fill"),
        (_change("image_id", 77), "annotation 10: its image_id 77 is not in the file"),
        (_change("category_id", 0), "annotation 10: its category_id 0 is not in the file"),
        (lambda tree: tree["images"][2].update(width=64), "image 3 (day 1/2.jpg): this mask is 64x48, its image 48x48"),
        (lambda tree: tree["images"][2].update(file_name="2.jpg"), "is missing, but"),
        (lambda tree: tree.pop("categories"), "no categories"),
    ],
)
def test_coco_files_that_are_refused(
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    change: Callable[[dict], None],
    message: str,
) -> None:
    """One message that names the file, exit code 2, nothing written."""
    file = coco / "annotations" / "instances_default.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    before = sorted(tmp_path.rglob("*"))
    args = ["--images", coco / "images" / "default", "--masks", file, "--out", tmp_path / "run"]
    assert command(monkeypatch, "learn", "--new", "--pretrained", "no", *args) == 2
    text = capsys.readouterr().err
    assert message in text and str(file) in text and "Traceback" not in text
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_of_a_coco_file(coco: Path) -> None:
    with pytest.raises(UserError, match=r"if .*instances_default\.json is a COCO file, give it as --masks"):
        pair_files(coco / "images" / "default", coco / "annotations", read_classes("cat"))
    with pytest.raises(UserError, match=r"--masks .*: no such folder or COCO file"):
        pair_files(coco / "images" / "default", coco / "instances.json", read_classes("cat"))
