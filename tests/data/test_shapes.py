"""The synthetic data set: its layout, classes and reproducibility."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starseg.data.shapes import FORMAT_VERSION, IGNORE, SHAPE_CLASSES, write_shapes

TRAIN, VAL, SIZE = 30, 10, 64
CLASSES = range(1, len(SHAPE_CLASSES))
LISTS = Path("ImageSets/Segmentation")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def times(root: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in root.rglob("*")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "deep" / "shapes"
    return write_shapes(folder, train=TRAIN, val=VAL, size=SIZE, seed=3)


@pytest.fixture(scope="module")
def masks(root: Path) -> np.ndarray:
    paths = sorted(root.glob("SegmentationClass*/*.png"))
    return np.stack([np.asarray(Image.open(path)) for path in paths])


def test_layout_and_lists(root: Path) -> None:
    train = [f"train_{index:05d}" for index in range(TRAIN)]
    val = [f"val_{index:05d}" for index in range(VAL)]
    assert (root / LISTS / "train_aug.txt").read_text().splitlines() == [
        f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png" for name in train
    ]
    assert (root / LISTS / "val.txt").read_text().splitlines() == val
    assert (root / "classes.txt").read_text().splitlines() == list(SHAPE_CLASSES)
    expected = {"classes.txt", "shapes.json", str(LISTS / "train_aug.txt"), str(LISTS / "val.txt")}
    expected |= {f"JPEGImages/{name}.jpg" for name in train + val}
    expected |= {f"SegmentationClassAug/{name}.png" for name in train}
    expected |= {f"SegmentationClass/{name}.png" for name in val}
    assert contents(root).keys() == expected
    assert [path.name for path in root.parent.iterdir()] == ["shapes"]


def test_images_and_masks_have_the_voc_format(root: Path) -> None:
    for path in root.glob("JPEGImages/*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIZE, SIZE))
    for path in root.glob("SegmentationClass*/*.png"):
        with Image.open(path) as mask:
            assert (mask.format, mask.mode, mask.size) == ("PNG", "P", (SIZE, SIZE))
            palette = np.reshape(mask.getpalette(), (-1, 3))
            used = [
                (0, (0, 0, 0)),
                (1, (128, 0, 0)),
                (2, (0, 128, 0)),
                (10, (64, 128, 0)),
                (255, (224, 224, 192)),
            ]
            for index, colour in used:
                assert tuple(palette[index]) == colour


def test_masks_hold_every_class_and_nothing_else(masks: np.ndarray) -> None:
    assert len(SHAPE_CLASSES) >= 9
    assert masks.dtype == np.uint8
    assert set(np.unique(masks)) == {0, *CLASSES, IGNORE}


def test_classes_are_balanced_and_of_fair_size(masks: np.ndarray) -> None:
    areas = np.stack([(masks == label).mean((1, 2)) for label in CLASSES], axis=1)
    counts = (areas > 0).sum(0)
    assert counts.min() >= len(masks) // len(CLASSES) - 1
    largest = areas.max(0)
    assert largest.min() > 0.05
    assert largest.max() < 0.5


def test_classes_occur_together(masks: np.ndarray) -> None:
    present = np.stack([(masks == label).any((1, 2)) for label in CLASSES], axis=1)
    together = present.T.astype(int) @ present
    np.fill_diagonal(together, 0)
    assert (together.sum(0) > 0).all()
    first, second = together[:5, :5].sum(), together[:5, 5:].sum()
    assert first > 0
    assert second > 0
    assert set(present.sum(1)) == {1, 2, 3}


def test_a_thin_border_parts_every_object_from_its_surroundings(masks: np.ndarray) -> None:
    for axis in (1, 2):
        near, far = np.moveaxis(masks, axis, 0)[:-1], np.moveaxis(masks, axis, 0)[1:]
        crossing = (near != far) & (near != IGNORE) & (far != IGNORE)
        assert crossing.mean() < 1e-3
    assert 0.01 < (masks == IGNORE).mean() < 0.12


def test_borders_lie_on_the_edges_of_the_image(root: Path) -> None:
    steps: dict[bool, list[float]] = {True: [], False: []}
    for path in root.glob("SegmentationClassAug/*.png"):
        image = np.asarray(Image.open(root / "JPEGImages" / f"{path.stem}.jpg").convert("L"), np.float32)
        step = np.hypot(*np.gradient(image))
        border, background = (np.asarray(Image.open(path)) == value for value in (IGNORE, 0))
        steps[True].append(step[border].mean())
        steps[False].append(step[background].mean())
    assert np.mean(steps[True]) > 1.5 * np.mean(steps[False])


def test_same_arguments_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = write_shapes(tmp_path / "again", train=TRAIN, val=VAL, size=SIZE, seed=3)
    assert contents(again) == contents(root)


def test_an_image_does_not_depend_on_the_counts(root: Path, tmp_path: Path) -> None:
    fewer = contents(write_shapes(tmp_path / "fewer", train=4, val=2, size=SIZE, seed=3))
    pictures = {name for name in fewer if name.endswith((".jpg", ".png"))}
    assert len(pictures) == 12
    whole = contents(root)
    assert all(fewer[name] == whole[name] for name in pictures)


def test_seed_splits_and_images_differ(root: Path, tmp_path: Path) -> None:
    other = write_shapes(tmp_path / "other", train=2, val=2, size=SIZE, seed=4)
    images = [path.read_bytes() for folder in (root, other) for path in folder.glob("JPEGImages/*.jpg")]
    assert len(set(images)) == len(images)


def test_second_call_rewrites_nothing(root: Path) -> None:
    before = times(root)
    assert write_shapes(root, train=TRAIN, val=VAL, size=SIZE, seed=3) == root
    assert times(root) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert write_shapes(tmp_path, train=1, val=1, size=32) == tmp_path
    recipe = {"version": FORMAT_VERSION, "train": 1, "val": 1, "size": 32, "seed": 0, "classes": len(SHAPE_CLASSES) - 1}
    assert json.loads((tmp_path / "shapes.json").read_text()) == recipe


@pytest.mark.parametrize("changed", [{"train": 3}, {"val": 2}, {"size": 48}, {"seed": 1}])
def test_another_recipe_is_refused(tmp_path: Path, changed: dict[str, int]) -> None:
    recipe = {"train": 2, "val": 1, "size": 32, "seed": 0}
    folder = write_shapes(tmp_path / "shapes", **recipe)
    before = times(tmp_path)
    with pytest.raises(ValueError, match="delete that folder or choose another") as caught:
        write_shapes(folder, **recipe | changed)
    assert str(folder) in str(caught.value)
    assert times(tmp_path) == before


@pytest.mark.parametrize("marker", [None, "", "not json", "[]"])
def test_a_foreign_folder_is_refused_untouched(tmp_path: Path, marker: str | None) -> None:
    (tmp_path / "thesis.txt").write_text("do not lose me")
    if marker is not None:
        (tmp_path / "shapes.json").write_text(marker)
    before = times(tmp_path.parent)
    with pytest.raises(ValueError, match="not a shapes data set"):
        write_shapes(tmp_path, train=1, val=1, size=32)
    assert times(tmp_path.parent) == before


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shapes").write_text("a file")
    with pytest.raises(ValueError, match="not a shapes data set"):
        write_shapes(tmp_path / "shapes", train=1, val=1, size=32)


@pytest.mark.parametrize("bad", [{"train": 0}, {"val": 0}, {"size": 31}, {"seed": -1}])
def test_arguments_out_of_range_are_refused(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))} >= "):
        write_shapes(tmp_path / "new" / "shapes", **bad)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_part_way_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("starseg.data.shapes._develop", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shapes(tmp_path / "shapes", train=1, val=1, size=32)
    assert list(tmp_path.iterdir()) == []
