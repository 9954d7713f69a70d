"""`starseg learn` explains common mistakes in masks, class lists and paths."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from starseg.data.annotations.classlist import read_classes
from starseg.data.annotations.photos import pair_files, read_indices
from starseg.engine.evaluate import evaluate_model, open_weights
from starseg.engine.rundir import load_run_config
from starseg.errors import UserError
from starseg.finetuning.prepare import LearnRequest, prepare_step
from starseg.finetuning.run import learn

QUIET = Console(quiet=True)


@pytest.fixture
def request_for(tmp_path: Path) -> LearnRequest:
    """Four photos with a square of 255 in each mask."""
    for kind in ("photos", "masks"):
        (tmp_path / kind).mkdir()
    mask = np.zeros((48, 48), np.uint8)
    mask[8:30, 8:30] = 255
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    return LearnRequest(None, tmp_path / "photos", tmp_path / "masks", "cat", tmp_path / "run")


def _with(request: LearnRequest, **changes: object) -> LearnRequest:
    return replace(request, **changes)  # type: ignore[arg-type]


def _list(tmp_path: Path, text: str, encoding: str = "utf-8") -> str:
    (tmp_path / "classes.txt").write_text(text, encoding=encoding)
    return str(tmp_path / "classes.txt")


def test_black_and_white_masks_get_advice_on_colours(request_for: LearnRequest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no mask shows cat; the masks hold only 0 and 255, and 255 is ig") as caught:
        prepare_step(request_for, None, tmp_path / "prepared", QUIET)
    lines = re.findall("'([^']* #[^']*)'", str(caught.value))
    assert lines == ["background #000000", "cat #ffffff"]
    by_colour = _with(request_for, classes=_list(tmp_path, "\n".join(lines)))
    assert prepare_step(by_colour, None, tmp_path / "prepared", QUIET).pixels[:, 1].all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "I;16"])
def test_colour_masks_get_advice_on_colours(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"8-bit palette or grey .*masks in colour \(RGB, RGBA\) .*'cat #c00080'"):
        read_indices(tmp_path / "m.png", (4, 4), read_classes("cat"))


def test_transparent_pixels_are_named(tmp_path: Path) -> None:
    classes = read_classes(_list(tmp_path, "background\ncat #ff0000\n"))
    Image.new("RGBA", (4, 3), (0, 0, 0, 0)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"colour 255 255 255 is no class .*12 of them transparent"):
        read_indices(tmp_path / "m.png", (3, 4), classes)
    Image.new("RGBA", (4, 3), (0, 0, 9, 255)).save(tmp_path / "m.png")
    with pytest.raises(UserError, match=r"colour 0 0 9 is no class .*\(12 pixels of other colours\)"):
        read_indices(tmp_path / "m.png", (3, 4), classes)


def test_a_class_list_from_a_windows_editor(tmp_path: Path) -> None:
    assert read_classes(_list(tmp_path, "background\r\ncat\r\n", "utf-8-sig")).names == ("background", "cat")


@pytest.mark.parametrize("line", ["cat #c0008", "cat #c00080ff", "cat #fff", "cat #", "cat #c0008g", "# a comment"])
def test_invalid_colours_are_refused(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=f"expected 'name', 'name R G B' or 'name #rrggbb', got '{line}'"):
        read_classes(_list(tmp_path, f"background\n{line}\ndog #0000ff\n"))


@pytest.mark.parametrize(("given", "place"), [("cat,,dog", "2 of 3"), ("cat, ", "2 of 2"), (",", "1 of 2")])
def test_empty_names(given: str, place: str) -> None:
    with pytest.raises(UserError, match=f"name {place} is empty"):
        read_classes(given)


def test_files_that_are_not_read_are_named(
    request_for: LearnRequest, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("x.heic", ".hidden.gif", "classes.txt", "instances.json"):
        (request_for.images / name).touch()
    pair_files(request_for.images, request_for.masks, read_classes("cat"))
    assert capsys.readouterr().err == "note: 1 file is no image starseg reads: x.heic\n"


@pytest.mark.parametrize("dry_run", [False, True])
def test_places_that_cannot_be_written(request_for: LearnRequest, tmp_path: Path, dry_run: bool) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "run", Path("/proc/x")):
        with pytest.raises(UserError, match=f"--out {out}: nothing can be written into {out.parent} "):
            learn(_with(request_for, out=out), QUIET, dry_run)


def test_a_dry_run_refuses_what_the_run_refuses(request_for: LearnRequest, tmp_path: Path) -> None:
    request = _with(request_for, backbone="test_resnet", pretrained=False, crop=32, epochs=1)
    request = _with(request, classes=_list(tmp_path, "background\ncat #ffffff\n"))
    learn(request, QUIET)
    learn(request, QUIET, dry_run=True)
    for other, message in (({"seed": 1}, "holds a step learnt from other"), ({"lr": 0.5}, "another configuration")):
        for dry_run in (True, False):
            with pytest.raises(UserError, match=message):
                learn(_with(request, **other), QUIET, dry_run)


def _values(request: LearnRequest, *values: int) -> None:
    """Paint masks in horizontal stripes of these values."""
    stripes = np.repeat(np.array(values, np.uint8), 48 // len(values))[:, None].repeat(48, 1)
    for path in request.masks.iterdir():
        Image.fromarray(np.pad(stripes, ((0, 48 - len(stripes)), (0, 0)), mode="edge")).save(path)


def test_masks_without_a_background_get_advice(request_for: LearnRequest, tmp_path: Path) -> None:
    """To shorten the list, as another message says, would give every class the pixels of the next."""
    _values(request_for, 0, 1, 2)
    with pytest.raises(UserError) as caught:
        prepare_step(_with(request_for, classes="wall,floor,ceiling"), None, tmp_path / "prepared", QUIET)
    message = str(caught.value)
    assert (
        "no mask shows ceiling; the masks hold the values 0, 1, 2, where 0 is the background and 1 is wall" in message
    )
    commands = [line.strip() for line in message.splitlines() if line.strip().startswith("starseg learn --new ")]
    assert "--classes wall,floor,ceiling --no-background --out" in commands[0]
    assert "--classes background,wall,floor --out" in commands[1]
    assert "--classes wall,floor --ignore 0 --out" in commands[2] and len(commands) == 3
    _values(request_for, 1, 2, 3)
    prepared = prepare_step(_with(request_for, classes="wall,floor,ceiling"), None, tmp_path / "prepared", QUIET)
    assert prepared.pixels[:, :4].tolist() == [[0, 768, 768, 768]] * 4


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        ((0, 2), "cat,dog", "no mask shows cat; the masks hold the values 0, 2, where .* 1 is cat; add images of it"),
        ((0, 3), "cat,dog,cow", "no mask shows cat, dog; the masks hold the values 0, 3, .*; add images of them"),
        ((1, 2), "cat,dog,cow", "no mask shows cow; the masks hold the values 1, 2, .*whose order is the order of the"),
    ],
)
def test_values_are_named_where_a_class_is_absent(
    request_for: LearnRequest, tmp_path: Path, values: tuple[int, ...], classes: str, message: str
) -> None:
    _values(request_for, *values)
    with pytest.raises(UserError, match=message) as caught:
        prepare_step(_with(request_for, classes=classes), None, tmp_path / "prepared", QUIET)
    assert "shorten" not in str(caught.value)


def test_a_list_of_names_may_be_longer_than_a_file_name() -> None:
    names = [f"class {number}" for number in range(100)]
    assert read_classes(",".join(names)).names == ("background", *names)
    with pytest.raises(UserError, match="no such file"):
        read_classes("x" * 300 + ".txt")


def test_a_finished_run_inside_the_folder_of_images_goes_on(request_for: LearnRequest, tmp_path: Path) -> None:
    """`--images . --masks masks --out run`, repeated: the run's own masks are no images."""
    request = _with(request_for, images=tmp_path, backbone="test_resnet", pretrained=False, crop=32, epochs=1)
    request = _with(request, classes=_list(tmp_path, "background\ncat #ffffff\n"), out=tmp_path / "run")
    for path in (tmp_path / "photos").iterdir():
        path.rename(tmp_path / path.name)
    step = learn(request, QUIET)
    assert step is not None
    weights = (step / "model.safetensors").stat().st_mtime_ns
    for dry_run in (True, False):
        learn(request, QUIET, dry_run)
    assert (step / "model.safetensors").stat().st_mtime_ns == weights, "nothing was trained again"
    other = learn(_with(request, out=tmp_path / "other"), QUIET)
    assert other is not None
    lists = [(run / "learn" / "train.txt").read_text() for run in (tmp_path / "run", tmp_path / "other")]
    assert lists[0] == lists[1] and lists[0].count(str(tmp_path)) == len(lists[0].splitlines())


def test_a_run_may_be_renamed_moved_or_copied(request_for: LearnRequest, tmp_path: Path) -> None:
    request = _with(request_for, backbone="test_resnet", pretrained=False, crop=32, epochs=1)
    request = _with(request, classes=_list(tmp_path, "background\ncat #ffffff\n"))
    learn(request, QUIET)
    figures = [_evaluated(tmp_path / "run")]
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (tmp_path / "run" / "learn" / "val.txt").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "copy").rename(tmp_path / "elsewhere" / "renamed")
    renamed = tmp_path / "elsewhere" / "renamed"
    assert load_run_config(renamed).data.root == renamed / "learn", "its own data, although the old ones are there"
    figures.append(_evaluated(renamed))
    shutil.rmtree(tmp_path / "run")
    figures.append(_evaluated(renamed))
    assert figures[0] == figures[1] == figures[2]
    given = load_run_config(renamed, [f"data.root={tmp_path}/learn"])
    assert given.data.root == tmp_path / "learn"
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=rf"If they were moved, correct their paths in the lists of {renamed}/learn; docs"
    ):
        _evaluated(renamed)


def _evaluated(run: Path) -> list[list[int]]:
    return evaluate_model(*open_weights(run / "step_0", []), QUIET)["confusion"]
