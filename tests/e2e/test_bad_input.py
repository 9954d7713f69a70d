"""Bad input gives one readable message and exit code 2 before training, and nothing is written.

What the cases damage are copies of a data set and of a finished step. `pytest -rP tests/e2e/test_bad_input.py` prints
the table, under the last test.
"""

import errno
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from starseg.cli.main import main
from starseg.config import parse_config
from starseg.experiments.train import train

Change = Callable[[dict, Path], None]
LISTS = "ImageSets/Segmentation"


class _Trap:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/starseg-was-here",)


def _set(key: str, value: Any) -> Change:
    def change(settings: dict, data: Path) -> None:
        *parents, leaf = key.split(".")
        for part in parents:
            settings = settings.setdefault(part, {})
        settings[leaf] = value

    return change


def _first(data: Path, folder: str) -> Path:
    split, suffix = "val" if folder == "SegmentationClass" else "train", "jpg" if folder == "JPEGImages" else "png"
    return data / folder / f"{split}_00000.{suffix}"


def _file(folder: str, how: Callable[[Path], None]) -> Change:
    return lambda settings, data: how(_first(data, folder))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _lines(name: str, how: Callable[[list[str]], list[str]]) -> Change:
    def change(settings: dict, data: Path) -> None:
        path = data / LISTS / name
        path.write_text("\n".join(how(path.read_text().splitlines())))

    return change


def _paint(value: int, shape: tuple[int, ...] | None = None, dtype: type = np.uint8) -> Callable[[Path], None]:
    def how(path: Path) -> None:
        with Image.open(path) as image:
            size = image.size[::-1]
        Image.fromarray(np.full(shape or size, value, dtype)).save(path)

    return how


def _names(*names: str) -> Change:
    return lambda settings, data: (data / "classes.txt").write_text("\n".join(names)) and None


def _fewer_names(settings: dict, data: Path) -> None:
    _names("background", "disc")(settings, data)
    settings["task"] = {"steps": [["disc"]]}


def _name_twice(settings: dict, data: Path) -> None:
    _names("background", "disc", "square", "triangle", "disc", "heart")(settings, data)


def _unreadable_list(settings: dict, data: Path) -> None:
    folder = data.parent / "lists" / "voc"
    folder.mkdir(parents=True)
    (folder / "overlap_tiny_train_00.npy").write_bytes(b"no array")
    settings["data"]["lists"] = str(data.parent / "lists")


def _weights(content: Any) -> Change:
    def change(settings: dict, data: Path) -> None:
        path = data.parent / "weights.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        settings["model"] = {**settings["model"], "pretrained": str(path)}

    return change


def _ade(how: Callable[[Path], None]) -> Change:
    def change(settings: dict, data: Path) -> None:
        settings["data"] |= {"dataset": "ade"}
        how(data)

    return change


STEPS = "task.steps"
CONFIGS: dict[str, tuple[Change, str]] = {
    "unknown section": (_set("trian", {}), "trian: unknown key; did you mean 'train'?"),
    "unknown key": (_set("train.epochs", 3), "train.epochs: unknown key"),
    "unknown nested key": (_set("train.base.epoch", 3), "train.base.epoch: unknown key; did you mean 'epochs'?"),
    "unknown option of the method": (_set("star.ocmf", 3), "star.ocmf: unknown key; did you mean 'ocfm'?"),
    "a section that is a value": (_set("train", 3), "train: input should be"),
    "text for a number": (_set("train.batch_size", "many"), "train.batch_size: input should be a valid integer"),
    "list for a number": (_set("seed", [1]), "seed: input should be a valid integer"),
    "negative seed": (_set("seed", -1), "seed: input should be greater than or equal to 0"),
    "negative learning rate": (_set("train.base.lr", -1), "train.base.lr: input should be greater than 0"),
    "no epochs": (_set("train.later.epochs", 0), "train.later.epochs: input should be greater than 0"),
    "warm-up above 1": (_set("train.warmup", 1.5), "train.warmup: input should be less than 1"),
    "negative loss weight": (_set("star.sad", -1), "star.sad: input should be greater than or equal to 0"),
    "unknown precision": (_set("train.precision", "8"), "train.precision: input should be"),
    "unknown compat": (_set("compat", "mostly"), "compat: input should be 'published'"),
    "unknown setting": (
        _set("task.setting", "sequential"),
        "task.setting: input should be 'overlap', 'disjoint' or 'domain'",
    ),
    "unknown data set": (
        _set("data.dataset", "coco"),
        "data.dataset: unknown data set 'coco'; known: ade, ade_full, camvid, city,",
    ),
    "output stride 4": (_set("model.output_stride", 4), "model.output_stride: input should be 8 or 16"),
    "crop beside the grid": (_set("data.crop", 60), "data.crop: 60 is no multiple of model.output_stride"),
    "crop 0": (_set("data.crop", 0), "data.crop: input should be greater than 0"),
    "one image a batch": (_set("train.batch_size", 1), "train.batch_size: batch norm needs at least 2 images"),
    "one image a process": (
        _set("train.devices", 3),
        "train.batch_size: batch norm needs at least 2 images in each of 3",
    ),
    "no process": (_set("train.devices", 0), "train.devices: input should be greater than 0"),
    "batch larger than a step": (_set("train.batch_size", 40), "training images, fewer than train.batch_size (40)"),
    "no GPU": (_set("train.accelerator", "gpu"), "train.accelerator: gpu is asked for, but torch sees none"),
    "unknown method": (_set("method", "starr"), "method: unknown method 'starr'; known: "),
    "exemplars without a memory": (
        lambda s, d: s.update(method="finetune", memory={"size": 3}),
        "memory.size: method finetune keeps no images",
    ),
    "negative memory": (_set("memory.size", -1), "memory.size: input should be greater than or equal to 0"),
    "no task": (_set("task", {}), "task: give task.name (a published task such as 15-1) or task.steps"),
    "unknown task": (_set("task", {"name": "15-2"}), "task.name: unknown task '15-2'"),
    "no steps": (_set(STEPS, []), "every step needs at least one class"),
    "an empty step": (_set(STEPS, [["disc"], []]), "every step needs at least one class"),
    "a class twice": (_set(STEPS, [["disc"], ["disc"]]), "classes listed twice: ['disc']"),
    "unknown class": (_set(STEPS, [["disk"]]), "unknown class 'disk'; this data set has: disc"),
    "unknown class id": (_set(STEPS, [[77]]), "unknown class ids [77]; this data set has 1..5"),
    "background as a class": (_set(STEPS, [[0, 1]]), "unknown class ids [0]"),
    "ignore as a class": (_set(STEPS, [[255, 1]]), "unknown class ids [255]"),
    "unknown backbone": (_set("model.backbone", "resnet1001"), "model.backbone: timm has no model 'resnet1001'"),
    "backbone of one image size": (
        _set("model.backbone", "coat_tiny"),
        "model.backbone: 'coat_tiny'",
    ),
    "weights missing": (_set("model.pretrained", "/nowhere.pth"), "model.pretrained: /nowhere.pth does not exist"),
    "weights cut off": (_weights(b"PK\x03\x04"), "weights.pth is no file of plain weights"),
    "weights that are code": (_weights(pickle.dumps(_Trap())), "weights.pth is no file of plain weights"),
    "weights of another network": (_weights({"a": torch.zeros(3)}), "does not fit this backbone"),
    "weights without tensors": (_weights({"a": 1}), "holds no state dict"),
    "start_from nowhere": (_set("start_from", "/nowhere"), "/nowhere: no step directory"),
    "out is a file": (lambda s, d: s.update(out=str(d / "classes.txt")), "classes.txt is a file, expected a folder"),
    "an image list that is none": (_unreadable_list, "expected a published list of image names"),
}
DATA: dict[str, tuple[Change, str]] = {
    "root missing": (_set("data.root", "/nowhere"), "/nowhere/ImageSets/Segmentation/train_aug.txt: cannot read"),
    "list missing": (lambda s, d: (d / LISTS / "val.txt").unlink(), "val.txt: cannot read"),
    "list empty": (_lines("train_aug.txt", lambda lines: []), "its list of training images is empty"),
    "list of another form": (_lines("val.txt", lambda lines: ["a b c"]), "val.txt, line 1: expected"),
    "image missing": (_file("JPEGImages", Path.unlink), "training images are missing, the first is"),
    "mask missing": (_file("SegmentationClass", Path.unlink), "test masks are missing, the first is"),
    "image cut off": (_file("JPEGImages", _cut), "train_00000.jpg: cannot read this image"),
    "image that is text": (_file("JPEGImages", lambda p: p.write_text("hello")), "cannot read this image"),
    "mask cut off": (_file("SegmentationClassAug", _cut), "train_00000.png: cannot read this mask"),
    "mask in colour": (_file("SegmentationClassAug", _paint(1, (64, 64, 3))), "8-bit palette or grey image, not 'RGB'"),
    "mask of 16 bits": (_file("SegmentationClassAug", _paint(1, dtype=np.uint16)), "8-bit palette or grey image"),
    "mask of another size": (_file("SegmentationClassAug", _paint(1, (10, 9))), "this mask is 9x10, its image 64x64"),
    "ids that are no classes": (_file("SegmentationClass", _paint(99)), "ids [99] are no classes of this data set"),
    "fewer names than classes": (_fewer_names, "are no classes of this data set"),
    "a name twice": (_name_twice, "names a class twice: disc"),
    "no image shows a class": (
        _lines("train_aug.txt", lambda lines: lines[:1]),
        "no training image shows",
    ),
    "VOC data as ADE20K": (_ade(lambda data: None), "objectInfo150.txt: cannot read this list"),
    "ADE20K class table": (
        _ade(
            lambda data: (
                [shutil.copytree(data / "JPEGImages", data / "images" / name) for name in ("training", "validation")]
                + [(data / "objectInfo150.txt").write_text("nothing")]
                and None
            )
        ),
        "objectInfo150.txt",
    ),
}


@pytest.fixture(scope="module")
def finished(tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a finished step 0."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return train(parse_config({**tiny_tree, "out": str(out)}), range(1), Console(quiet=True))


# Rows of (kind, exit code, message); whatever stands here wrote nothing.
TABLE: list[tuple[str, int, str]] = []


def _refused(
    kind: str, argv: list[str], message: str, watched: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    before = {p: p.stat().st_mtime_ns for p in watched.rglob("*") if p.name != ".lock"}
    monkeypatch.setattr(sys, "argv", ["starseg", *argv])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert message in error.replace("\n", " ") or message in error, error
    assert "Traceback" not in error
    assert {p: p.stat().st_mtime_ns for p in watched.rglob("*") if p.name != ".lock"} == before
    TABLE.append((kind, stopped.value.code, " ".join(error.split()).replace(str(watched), "...")))


@pytest.mark.parametrize("kind", [*CONFIGS, *DATA])
def test_training(
    kind: str, tiny: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = (CONFIGS | DATA)[kind]
    data = tmp_path / "data"
    shutil.copytree(tiny["data"]["root"], data)
    settings = {**tiny, "data": {**tiny["data"], "root": str(data)}}
    change(settings, data)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(settings))
    _refused(kind, ["train", str(config)], message, tmp_path, capsys, monkeypatch)
    assert not Path("/tmp/starseg-was-here").exists()


def _json(change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def how(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return how


def _swap_bank(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bank = load_file(path)
    save_file({k: v[:2] for k, v in bank.items()}, path)
    _json(lambda m: m["files"].pop(path.name))(path.with_name("metrics.json"))


STEP: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no model.json": ("model.json", Path.unlink, "no step directory (it holds no model.json)"),
    "newer version": ("model.json", _json(lambda m: m.update(format=9)), "format 9, this starseg reads formats 1 to 2"),
    "damaged model.json": ("model.json", _cut, "model.json: damaged, not valid JSON"),
    "model.json lacks a key": ("model.json", _json(lambda m: m.pop("names")), "model.json: "),
    "weights cut off": ("model.safetensors", _cut, "model.safetensors: damaged, not what was written"),
    "weights missing": ("model.safetensors", Path.unlink, "model.safetensors: missing or damaged"),
    "another backbone": (
        "model.json",
        _json(lambda m: m["architecture"].update(encoder="resnet18")),
        "does not fit model.json",
    ),
    "backbone unknown": (
        "model.json",
        _json(lambda m: m["architecture"].update(encoder="nonet")),
        "timm has no model 'nonet'",
    ),
    "damaged metrics.json": ("metrics.json", _cut, "metrics.json: damaged, not valid JSON"),
}
TRAIN_ONLY: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "bank cut off": ("bank.safetensors", _cut, "bank.safetensors: damaged, not what was written"),
    "bank missing": ("bank.safetensors", Path.unlink, "star needs the prototype bank of 3 old classes"),
    "bank of another task": ("bank.safetensors", _swap_bank, "star needs the prototype bank of 3 old classes"),
    "step not finished": ("metrics.json", Path.unlink, "step 1 needs step 0, which is not finished"),
}


@pytest.mark.parametrize(
    ("command", "kind"), [*(("eval", kind) for kind in STEP), *(("train", kind) for kind in STEP | TRAIN_ONLY)]
)
def test_step_directories(
    command: str,
    kind: str,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, how, message = (STEP | TRAIN_ONLY)[kind]
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**yaml.safe_load((run / "config.yaml").read_text()), "out": str(run)}))
    shutil.copy(config, run / "config.yaml")
    how(run / "step_0" / name)
    argv = ["eval", str(run / "step_0")] if command == "eval" else ["train", str(config), "--steps", "1"]
    _refused(f"{command}: {kind}", argv, message, run / "step_0", capsys, monkeypatch)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "/nowhere.yaml"], "/nowhere.yaml: cannot read the configuration"),
        (["train", "{config}", "epochs"], "override 'epochs': expected key=value"),
        (["train", "{config}", "seed=[1"], "is not valid YAML"),
        (["train", "{config}", "task.name.x=1"], "'name' is a value, not a section"),
        (["train", "{config}", "--steps", "one"], "--steps: expected a step or a range"),
        (["train", "{config}", "--steps", "2-7"], "task tiny has steps 0-2, asked for 2-7"),
        (["train", "{config}", "--steps", "2-1"], "task tiny has steps 0-2, asked for 2-1"),
        (["train", "{config}", "--steps", "1"], "step 1 needs step 0, which is not finished"),
        (["eval", "/nowhere/step_0"], "/nowhere/step_0: no step directory"),
        (["eval", "/nowhere/weights.pth"], "there is no checkpoint /nowhere/weights.pth"),
        (
            ["predict", "/nowhere/step_0", "a.jpg", "--out", "o", "--json", "/nowhere/e.json"],
            "--json /nowhere/e.json: expected a file in a folder",
        ),
        (["report", "/nowhere"], "/nowhere/results.json: cannot read"),
        (["data", "check", "{config}", "data.root=/nowhere"], "/nowhere/ImageSets"),
        (["data", "index", "{config}", "data.root=/nowhere"], "/nowhere/ImageSets"),
    ],
)
def test_commands(
    argv: list[str],
    message: str,
    tiny: dict,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny))
    filled = [a.format(config=config) for a in argv]
    _refused(" ".join(argv), filled, message, tmp_path, capsys, monkeypatch)


def test_a_folder_that_cannot_be_made(
    tiny: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own refusal names the path and the reason; --debug shows where it came from."""
    config, out = tmp_path / "c.yaml", tmp_path / "c.yaml" / "run"
    config.write_text(yaml.safe_dump(tiny))
    argv = ["train", str(config), "--out", str(out)]
    _refused("out below a file", argv, f"error: {out}: Not a directory\n", tmp_path, capsys, monkeypatch)
    monkeypatch.setattr(sys, "argv", ["starseg", "--debug", *argv])
    with pytest.raises(NotADirectoryError):
        main()


def test_a_file_system_without_locks_is_reported(
    tiny: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlockable(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unlockable)
    config, run = tmp_path / "c.yaml", Path(tiny["out"])
    run.mkdir()
    config.write_text(yaml.safe_dump(tiny))
    message = f"{run / '.lock'}: cannot be locked (No locks available)"
    (run / ".lock").touch()
    _refused("no locks", ["train", str(config)], message, tmp_path, capsys, monkeypatch)


def test_a_cache_that_cannot_be_written_is_not_needed(
    tiny: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny))
    monkeypatch.setenv("STARSEG_CACHE", str(config / "cache"))
    monkeypatch.setattr(sys, "argv", ["starseg", "data", "index", str(config)])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert stopped.value.code == 0 and "step 2: " in printed.out
    assert "note: " in printed.err and f"{config / 'cache'}" in printed.err and "Not a directory" in printed.err


def test_the_index_needs_no_recipe(
    tiny: dict, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starseg.methods.star.Star.recipes", {})
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny))
    monkeypatch.setattr(sys, "argv", ["starseg", "data", "index", str(config)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0 and "step 2: " in capsys.readouterr().out


def test_the_table() -> None:
    """Last, since it prints what the tests before it found."""
    for kind, code, message in TABLE:
        print(f"{kind} | {message} | exit code {code} | nothing written")
    kinds = {*CONFIGS, *DATA, *STEP, *TRAIN_ONLY}
    print(f"{len(TABLE)} bad inputs were refused")
    assert len(kinds) >= 60
