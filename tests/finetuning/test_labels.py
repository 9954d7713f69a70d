"""`starseg learn` on masks whose values are not 0 for the background and then the classes."""

import re
import shlex
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from starseg.cli.main import main
from starseg.data.annotations.classlist import read_classes
from starseg.errors import UserError
from starseg.finetuning.prepare import LearnRequest, PreparedStep, prepare_step

NAMES = "sky,building,pole,road,car"
Scene = Callable[..., LearnRequest]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """Makes six photos whose masks are stripes of the given values, the k-th one of k + 1 lines or of equal heights."""

    def make(classes: str, *values: int, equal: bool = False, **options: object) -> LearnRequest:
        heights = [48 // len(values)] * len(values) if equal else [2 + k for k in range(len(values))]
        mask = np.repeat(np.array(values, np.uint8), heights)[:, None].repeat(32, 1)
        for kind in ("photos", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
        for number in range(6):
            noise = np.random.default_rng(number).integers(0, 256, (*mask.shape, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
            Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        folders = tmp_path / "photos", tmp_path / "masks"
        return LearnRequest(None, *folders, classes, tmp_path / "run", **options)  # type: ignore[arg-type]

    return make


def _prepare(request: LearnRequest) -> PreparedStep:
    return prepare_step(request, None, request.out.parent / "prepared", Console(quiet=True))


def _answers(request: LearnRequest) -> list[str]:
    """The options of the commands in the question that ends a request: what stands between --masks and --out."""
    with pytest.raises(UserError, match="Which of these is right") as caught:
        _prepare(request)
    commands = re.findall(r"^ +(starseg learn .*)$", str(caught.value), re.M)
    assert all(f"--new --images {request.images} --masks {request.masks} " in command for command in commands)
    return [command.split(f"{request.masks} --classes ")[1].split(" --out ")[0] for command in commands]


def _pixels(step: PreparedStep) -> dict[str, int]:
    """Lines of each named class and of 255 in a mask of :func:`scene`."""
    lines = step.pixels[0] // 32
    names = {name: int(lines[i]) for i, name in enumerate(step.names) if lines[i] or not name.startswith("unused")}
    return {**names, "ignored": int(lines[255])}


def test_five_classes_and_void_without_an_option_are_refused_with_the_question(scene: Scene) -> None:
    for equal in (True, False):
        request = scene(NAMES, 0, 1, 2, 3, 4, 5, equal=equal)
        assert _answers(request) == [f"background,{NAMES}", f"{NAMES} --no-background --ignore 5"]
    assert _pixels(_prepare(scene(f"background,{NAMES}", 0, 1, 2, 3, 4, 5)))["car"] == 7


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (NAMES, {"background": False}, r"indices \[5\] are no lines"),
        (NAMES, {"ignored": (5,)}, "--ignore 5: is the value of car"),
        (NAMES, {"background": False, "ignored": (4, 5)}, "--ignore 4: is the value of car"),
        (NAMES.removesuffix(",car"), {"background": False, "ignored": (5,)}, r"indices \[4\] are no lines"),
        (f"{NAMES},tree", {"background": False, "ignored": (5,)}, "--ignore 5: is the value of tree"),
        (f"{NAMES},tree,bush", {"background": False}, "no mask shows bush"),
        (f"{NAMES},tree", {}, "no mask shows tree"),
        (f"background,{NAMES}", {"background": False, "ignored": (5,)}, "names 'background'"),
        (f"background,{NAMES}", {"ignored": (5,)}, "--ignore 5: is the value of car"),
        (f"{NAMES},sky", {"background": False}, "names a class twice"),
    ],
)
def test_wrong_calls_on_five_classes_and_void(
    scene: Scene, classes: str, options: dict[str, object], message: str
) -> None:
    request = scene(classes, 0, 1, 2, 3, 4, 5, **options)
    with pytest.raises(UserError, match=message):
        _prepare(request)
    assert not (request.out.parent / "prepared" / "train.txt").exists()


def test_no_background_and_ignored_values(scene: Scene) -> None:
    step = _prepare(scene(NAMES, 0, 1, 2, 3, 4, 5, background=False, ignored=(5,)))
    expected = {"background": 0, "sky": 2, "building": 3, "pole": 4, "road": 5, "car": 6, "ignored": 7}
    assert _pixels(step) == expected and step.steps == [[1, 2, 3, 4, 5]]


def test_ignore_0_has_no_background_either(scene: Scene) -> None:
    step = _prepare(scene("wall,floor", 0, 1, 2, ignored=(0,)))
    assert _pixels(step) == {"background": 0, "wall": 3, "floor": 4, "ignored": 2}


def test_masks_with_a_background_are_accepted_as_they_are(scene: Scene) -> None:
    for classes in ("wall,floor", "background,wall,floor"):
        assert _pixels(_prepare(scene(classes, 0, 1, 2, equal=True))) == {
            "background": 16,
            "wall": 16,
            "floor": 16,
            "ignored": 0,
        }


@pytest.mark.parametrize(
    ("values", "classes", "options", "answers"),
    [
        (
            (0, 1, 2, 3),
            "wall,floor",
            {},
            [
                "background,wall,floor --ignore 3",
                "background,wall,floor,NAME3",
                "wall,floor --ignore 0 --ignore 3",
            ],
        ),
        (
            (0, 1, 2),
            "wall,floor",
            {"background": False},
            ["background,wall,floor", "wall,floor --ignore 0", "wall,floor --no-background --ignore 2"],
        ),
        (
            (0, 1),
            "wall,floor,door",
            {"background": False},
            ["wall,floor --no-background", "background,wall", "wall --ignore 0"],
        ),
        (
            (0, 1, 2, 3),
            "wall,floor",
            {"ignored": (0,)},
            ["background,wall,floor --ignore 3", "wall,floor --ignore 0 --ignore 3", "wall,floor,NAME3 --ignore 0"],
        ),
        ((1, 2, 9), "wall,floor", {}, ["background,wall,floor --ignore 9"]),
    ],
)
def test_values_that_do_not_fit_end_in_commands_that_do(
    scene: Scene, values: tuple[int, ...], classes: str, options: dict[str, object], answers: list[str]
) -> None:
    request = scene(classes, *values, **options)
    assert _answers(request) == answers
    for answer in answers:
        words = shlex.split(answer)
        ignored = tuple(int(b) for a, b in pairwise(words) if a == "--ignore")
        _prepare(scene(words[0], *values, background="--no-background" not in words, ignored=ignored))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "7 road\n8 side walk\n0 ignored\n"),
        ("a.txt", "8 side walk 1 2 3\n7 road #000000\n0 __ignore__ 9 9 9\n"),
        ("a.yaml", "- {id: 7, name: road}\n- {id: 8, name: side walk}\n- {id: 0, name: unlabelled, ignored: true}\n"),
        ("a.yml", "classes:\n- {id: 7, name: road, colour: [1, 2, 3]}\n- {id: 8, name: side walk, color: '#010204'}\n"),
        ("a.yaml", "path: x\nnc: 2\nnames: {7: road, 8: side walk}\n"),
    ],
)
def test_files_with_values(scene: Scene, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    ignored = () if "0" in text.split("names")[0] and "gnore" in text else (0,)
    step = _prepare(scene(str(tmp_path / name), 0, 7, 8, ignored=ignored))
    found = _pixels(step)
    assert (found["road"], found["side walk"], found["ignored"], found["background"]) == (3, 4, 2, 0)
    assert sorted(step.steps[0]) == [7, 8] and step.names[7] == "road"


def test_a_file_with_values_may_name_the_background(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0 road\n3 background\n")
    step = _prepare(scene(str(tmp_path / "a.txt"), 0, 3))
    assert _pixels(step) == {"background": 3, "road": 2, "ignored": 0}


def test_names_of_ultralytics_as_a_list_start_at_0(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text("train: images\nnames: [road, car]\n")
    assert _pixels(_prepare(scene(str(tmp_path / "data.yaml"), 0, 1))) == {
        "background": 0,
        "road": 2,
        "car": 3,
        "ignored": 0,
    }
    assert _answers(scene(str(tmp_path / "data.yaml"), 0, 1, 2)) == [f"{tmp_path / 'data.yaml'} --ignore 2"]


def test_a_yaml_list_of_names_is_that_of_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("- background\n- cat\n")
    assert read_classes(str(tmp_path / "a.yaml")).names == ("background", "cat")


def test_colours_of_a_list_without_a_background(tmp_path: Path, scene: Scene) -> None:
    (tmp_path / "a.yaml").write_text(
        "- {id: 4, name: road, colour: [0, 0, 0]}\n- {id: 2, name: void, colour: '#0000ff', ignored: true}\n"
        "- {id: 0, name: car, colour: '#ff0000'}\n"
    )
    request = scene(str(tmp_path / "a.yaml"), 4, 2, 0)
    by_value = _pixels(_prepare(request))
    for path in request.masks.iterdir():
        colours = np.zeros((256, 3), np.uint8)
        colours[[2, 0]] = (0, 0, 255), (255, 0, 0)
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)
    assert by_value == _pixels(_prepare(request)) == {"background": 0, "road": 2, "car": 4, "ignored": 3}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("background,cat", {"background": False}, "--no-background: --classes background,cat names 'background'"),
        ("cat,dog", {"ignored": (2,)}, "--ignore 2: is the value of dog in --classes cat,dog"),
        ("cat", {"ignored": (256,)}, "--ignore 256: expected a value in the masks, from 0 to 254"),
        ("1 cat\n1 dog", {}, "gives the value 1 to two classes"),
        ("255 cat", {}, "cat has the value 255; expected 0 to 254"),
        ("1 cat\n2 cat", {}, "names a class twice"),
        ("0 ignored", {}, "at least one class beside"),
        ("[{name: cat}, {name: dog, id: 2}]", {}, "these classes have no value while others have one: cat"),
        ("[{name: cat, ignore: true}]", {}, "expected a list of names or of entries with id"),
        ("[{name: cat, id: 1, colour: red}]", {}, "expected a colour such as '#c00080'"),
        ("[{name: cat, id: one}]", {}, "expected an id from 0 to 254"),
        ("names: [1, 2]", {}, "expected a list of names or of entries"),
        ("3", {}, "expected a list of names or of entries"),
        ("a: [", {}, r"cannot read this list \(while parsing"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, given: str, options: dict[str, object], message: str) -> None:
    if "," not in given.split("[")[0] and given != "cat":
        path = tmp_path / ("a.txt" if given[:1].isdigit() and " " in given else "a.yaml")
        path.write_text(given)
        given = str(path)
    with pytest.raises(UserError, match=message):
        read_classes(given, **options)  # type: ignore[arg-type]


def test_a_first_line_that_is_no_background_points_to_the_option(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("road\ncar\n")
    with pytest.raises(UserError, match="give --no-background if 0 is that class"):
        read_classes(str(tmp_path / "a.txt"))
    assert read_classes(str(tmp_path / "a.txt"), background=False).values == {0: 1, 1: 2}


@pytest.mark.parametrize(
    ("options", "code"),
    [([], 2), (["--no-background"], 2), (["--ignore", "5"], 2), (["--no-background", "--ignore", "5"], 0)],
)
def test_the_command(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str], code: int
) -> None:
    request = scene(NAMES, 0, 1, 2, 3, 4, 5)
    words = ["--new", "--images", request.images, "--masks", request.masks, "--classes", NAMES, "--out", request.out]
    tiny = ["--backbone", "test_resnet", "--pretrained", "no", "--crop", "32", "--epochs", "1"]
    monkeypatch.setattr(sys, "argv", ["starseg", "learn", *map(str, words), *tiny, *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code or 0) == code and request.out.exists() == (code == 0)


def test_ignored_values_are_for_masks_with_values(tmp_path: Path) -> None:
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": [], "categories": []}')
    request = LearnRequest(None, tmp_path, tmp_path / "coco.json", "cat", tmp_path / "run", ignored=(3,))
    with pytest.raises(UserError, match=r"--ignore: .*coco\.json is a COCO file"):
        _prepare(request)


# Rows of cityscapesscripts/helpers/labels.py, as they stand there.
LABELS_PY = """
Label = namedtuple( 'Label' , ['name', 'id', 'trainId', 'category', 'categoryId', 'hasInstances', 'ignoreInEval', 'color'] )
labels = [
    #       name                     id    trainId   category            catId     hasInstances   ignoreInEval   color
    Label(  'unlabeled'            ,  0 ,      255 , 'void'            , 0       , False        , True         , (  0,  0,  0) ),
    Label(  'ground'               ,  6 ,      255 , 'void'            , 0       , False        , True         , ( 81,  0, 81) ),
    Label(  'road'                 ,  7 ,        0 , 'flat'            , 1       , False        , False        , (128, 64,128) ),
    Label(  'traffic light'        , 19 ,        6 , 'object'          , 3       , False        , False        , (250,170, 30) ),
    Label(  'license plate'        , -1 ,       -1 , 'vehicle'         , 7       , False        , True         , (  0,  0,142) ),
]
trainId2label = { label.trainId : label for label in reversed(labels) }
"""  # noqa: E501


def test_the_label_table_of_cityscapes(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "labels.py").write_text(LABELS_PY)
    classes = read_classes(str(tmp_path / "labels.py"))
    assert classes.names == ("background", "road", "traffic light") and not classes.background
    assert classes.values == {7: 1, 19: 2} and classes.ignored == {0, 6}
    request = scene(str(tmp_path / "labels.py"), 0, 6, 7, 19)
    step = _prepare(request)
    found = {name: count for name, count in _pixels(step).items() if count}
    assert found == {"road": 4, "traffic light": 5, "ignored": 5} and step.steps == [[7, 19]]
    for path in request.masks.iterdir():  # gtFine_color
        colours = np.zeros((256, 3), np.uint8)
        colours[[6, 7, 19]] = (81, 0, 81), (128, 64, 128), (250, 170, 30)
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)
    assert {name: count for name, count in _pixels(_prepare(request)).items() if count} == found
    (tmp_path / "labels.py").write_text("import os\n")
    with pytest.raises(UserError, match=r"expected rows \"Label\('road', 7,.* Cityscapes' labels\.py"):
        read_classes(str(tmp_path / "labels.py"))


def test_reduce_zero_label_of_mmsegmentation(scene: Scene) -> None:
    """It ignores 0 and moves the other values down by one; here they keep them, in predicted masks too."""
    step = _prepare(scene("wall,floor,ceiling", 0, 1, 2, 3, ignored=(0,)))
    assert _pixels(step) == {"background": 0, "wall": 3, "floor": 4, "ceiling": 5, "ignored": 2}
    assert not step.background and step.mask_ids == {0: 255, 1: 1, 2: 2, 3: 3}


def test_the_label_map_of_cvat(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad:128,64,128::\ncar:0,0,142::\n"
    )
    request = scene(str(tmp_path / "labelmap.txt"), 0, 1, 2)
    for path in request.masks.iterdir():
        colours = np.array([(0, 0, 0), (128, 64, 128), (0, 0, 142)], np.uint8)
        Image.fromarray(colours[np.asarray(Image.open(path))]).save(path)
    assert _pixels(_prepare(request)) == {"background": 2, "road": 3, "car": 4, "ignored": 0}
