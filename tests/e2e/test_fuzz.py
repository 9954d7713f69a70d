"""Mutated configurations and files are accepted or refused with a UserError, and nothing is written.

By default a sample; `pytest -m slow tests/e2e/test_fuzz.py` runs 2,000 configurations and 540 files.
"""

import copy
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from starseg.compat.settings import parse_published, read_published
from starseg.compat.weights import load_checkpoint, load_prototypes, save_published
from starseg.config import load_config, parse_config
from starseg.data.images import image_size, read_image, read_mask
from starseg.engine import state as resume
from starseg.engine.checkpoint import load_bank, load_model
from starseg.engine.runner import train
from starseg.errors import UserError
from starseg.replay.bank import PrototypeBank
from starseg.utils.files import read_json

ROOT = Path(__file__).parents[2]
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "star",
    "15-1",
    "../x",
    "\x00",
    [],
    [[]],
    {},
]
VALUES += [[1], [["disc"]], {"a": 1}, "é" * 300, [None], [[1, "disc", None]], {"1": {}}]


def _places(tree: Any, path: tuple = ()) -> list[tuple]:
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] * bool(path) + [place for key, value in below for place in _places(value, (*path, key))]


def _mutate(tree: dict, draw: random.Random) -> dict:
    tree = copy.deepcopy(tree)
    for _ in range(draw.randint(1, 3)):
        places = _places(tree)
        if not places:
            break
        *parents, leaf = draw.choice(places)
        owner: Any = tree
        for key in parents:
            owner = owner[key]
        match draw.randrange(4):
            case 0:
                del owner[leaf]
            case 1 if isinstance(owner, dict):
                owner[str(leaf) + draw.choice("sx_ .")] = owner.pop(leaf)
            case 2 if isinstance(owner, dict):
                owner[draw.choice(["extra", "", "steps", "star", "data"])] = draw.choice(VALUES)
            case _:
                owner[leaf] = draw.choice(VALUES)
    return tree


def _damage(data: bytes, draw: random.Random) -> bytes:
    data = bytearray(data)
    match draw.randrange(4):
        case 0:
            return bytes(data[: draw.randrange(len(data) + 1)])
        case 1:
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        case 2:
            place = draw.randrange(len(data))
            data[place:place] = draw.randbytes(draw.randint(1, 64))
        case 3:
            start = draw.randrange(len(data))
            del data[start : start + draw.randint(1, 256)]
    return bytes(data)


def _taken_or_refused(run: Callable[[], object], what: object) -> bool:
    try:
        run()
    except UserError as error:
        assert str(error)
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__} for {what!r}") from error
    return True


def _sizes(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


FULL = {
    "method": "star",
    "seed": 1,
    "data": {"dataset": "voc", "root": "/data", "crop": 64, "workers": 0},
    "task": {"name": "mine", "steps": [["disc", 2], ["heart"]], "setting": "overlap"},
    "model": {"backbone": "test_resnet", "output_stride": 16, "pretrained": False},
    "train": {"batch_size": 4, "base": {"epochs": 1, "lr": 0.01}, "later": {"epochs": 1}, "warmup": 0.1},
    "memory": {"size": 3, "copy": True},
    "eval": {"image": "crop", "batch_size": 2},
    "star": {"pos_weight": 2, "ocfm": 1.0, "norm_noise": "vector"},
}


@_sizes(300, 2000)
def test_configurations(count: int, tmp_path: Path) -> None:
    draw, taken = random.Random(count), 0
    published = read_published(ROOT / "configs" / "config_ade.json")
    path = tmp_path / "c.yaml"
    for _ in range(count):
        tree = _mutate(FULL, draw)
        taken += _taken_or_refused(lambda tree=tree: parse_config(tree), tree)
        text = _damage(yaml.safe_dump(FULL).encode(), draw)
        path.write_bytes(text)
        _taken_or_refused(lambda: load_config(path), text)
        other = _mutate(published, draw)
        _taken_or_refused(lambda other=other: parse_published(other, "fuzz").to_run(), other)
    assert 0 < taken < count
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


_STATE = resume.TrainingState(3, {"a": torch.zeros(4)}, {}, {}, {}, torch.zeros(16, dtype=torch.uint8), [])


@pytest.fixture(scope="module")
def files(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """One good file of each kind, and how it is read."""
    folder = tmp_path_factory.mktemp("files")
    tree = {"data": {"root": str(shapes), "crop": 64}, "task": {"steps": [["disc", "square"], ["heart"]]}}
    tree |= {"model": {"backbone": "test_resnet", "pretrained": False}, "out": str(folder / "run")}
    tree |= {"train": {"batch_size": 4, "base": {"epochs": 1, "lr": 0.01}, "precision": "32"}}
    step = train(parse_config(tree), range(1), Console(quiet=True)) / "step_0"
    model, bank = load_model(step)[0], PrototypeBank.from_state_dict(load_bank(step))
    save_published(folder, 1, model.state_dict(), bank.state_dict())
    (folder / "resume.ckpt").write_bytes(resume.encode(_STATE))
    (step / "metrics.json").unlink()  # so that the readers, not the checksums, see the damage

    def beside(read: Callable[[Path], object]) -> Callable[[Path], object]:
        """Read a step directory of which one file was exchanged."""

        def run(path: Path) -> object:
            copied = path.parent / "step"
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(step, copied, ignore=shutil.ignore_patterns("logs"))
            shutil.copy(path, copied / path.name)
            return read(copied)

        return run

    published = read_published(ROOT / "configs" / "config_voc.json")
    published["data_loader"]["args"] |= {"root": str(shapes), "task": {"name": "joint"}}
    published["arch"]["args"] |= {"backbone": "test_resnet", "backbone_pretrained": False}
    settings = parse_published(published, "test")
    return {
        "image": (shapes / "JPEGImages" / "train_00000.jpg", lambda p: (read_image(p), image_size(p))),
        "mask": (shapes / "SegmentationClassAug" / "train_00000.png", read_mask),
        "model.safetensors": (step / "model.safetensors", beside(load_model)),
        "bank.safetensors": (step / "bank.safetensors", beside(load_bank)),
        "model.json": (step / "model.json", beside(load_model)),
        "results.json": (folder / "run" / "results.json", read_json),
        "resume.ckpt": (folder / "resume.ckpt", lambda p: resume.decode(p.read_bytes())),
        "checkpoint.pth": (folder / "checkpoint-epoch1.pth", lambda p: load_checkpoint(p, settings)),
        "prototypes.pth": (folder / "prototypes-epoch1.pth", load_prototypes),
    }


@pytest.mark.filterwarnings("ignore")
@_sizes(12, 60)
@pytest.mark.parametrize(
    "kind",
    [
        "image",
        "mask",
        "model.safetensors",
        "bank.safetensors",
        "model.json",
        "results.json",
        "resume.ckpt",
        "checkpoint.pth",
        "prototypes.pth",
    ],
)
def test_files(kind: str, count: int, files: dict[str, tuple[Path, Callable[[Path], object]]], tmp_path: Path) -> None:
    source, read = files[kind]
    data, draw = source.read_bytes(), random.Random(kind)
    path = tmp_path / source.name
    for number in range(count):
        path.write_bytes(_damage(data, draw))
        _taken_or_refused(lambda: read(path), f"{kind} {number}")
