"""Shared fixtures. Tests never touch the user's cache."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; torch reads it when it is imported, in child processes too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

SHARED = Path(os.environ.get("STARSEG_SHARED") or Path(__file__).parents[2] / "shared")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the session, because fixtures of modules train too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARSEG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _any_cpu() -> Iterator[None]:
    """``train.precision: auto`` chooses float32, as on a CPU that is slow at bf16, whatever this one is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def voc_subset() -> Path:
    """The real VOC subset."""
    root = SHARED / "data" / "PascalVOC2012"
    if not root.is_dir():
        pytest.skip(f"needs the real VOC subset at {root}; set STARSEG_SHARED to the folder that holds data/")
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny synthetic data set of 5 classes."""
    from starseg.data.shapes import write_shapes

    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", train=48, val=12, size=64, classes=5)


@pytest.fixture(scope="session")
def ade_shapes(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic data set in the ADE20K layout: its 5 classes are ids 1 to 5 of 150."""
    root = tmp_path_factory.mktemp("ade_shapes")
    for name, stem, masks in (
        ("training", "train", "SegmentationClassAug"),
        ("validation", "val", "SegmentationClass"),
    ):
        for kind, files in (
            ("images", shapes.glob(f"JPEGImages/{stem}_*")),
            ("annotations", shapes.glob(f"{masks}/*")),
        ):
            folder = root / kind / name
            folder.mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder)
    drawn = (shapes / "classes.txt").read_text().split()[1:]
    names = [*(f"{name}, drawn {name}" for name in drawn), *(f"thing {i}, also {i}" for i in range(6, 149))]
    names += ["screen, silver screen", "screen, of a telephone"]
    rows = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.01\t9\t3\t{name}" for i, name in enumerate(names, 1))]
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def ade_sample() -> Path:
    """Three real validation images of ADE20K."""
    root = SHARED / "data" / "ade20k_sample"
    if not root.is_dir():
        pytest.skip(f"needs the real ADE20K sample at {root}; set STARSEG_SHARED to the folder that holds data/")
    return root


@pytest.fixture(scope="session")
def tiny_tree(shapes: Path) -> dict:
    """Settings, without the folder, of a run that takes seconds; see :func:`tiny`. Not to be changed."""
    return {
        "method": "star",
        "data": {"root": str(shapes), "crop": 64},
        "task": {"name": "tiny", "steps": [["disc", "square", "triangle"], ["hexagon"], ["heart"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {
            "batch_size": 4,
            "base": {"epochs": 1, "lr": 0.01},
            "later": {"epochs": 1, "lr": 0.001},
            "precision": "32",
        },
    }


@pytest.fixture
def tiny(tiny_tree: dict, tmp_path: Path) -> dict:
    """Settings of a run that takes seconds: steps [disc, square, triangle], [hexagon], [heart] at 64 px."""
    return deepcopy(tiny_tree) | {"out": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps [cat, dog], [cow] with random weights and dataset ids that are not training ids. Not to be changed."""
    from starseg.engine.checkpoint import StepInfo, save_step
    from starseg.models import Architecture, make_network

    run = tmp_path_factory.mktemp("random") / "run"
    torch.manual_seed(0)
    architecture = Architecture("test_resnet")
    for heads in ([2, 1], [2]):
        model, count, step = make_network(architecture, heads).eval(), 1 + sum(heads), len(heads) - 1
        for head in model.heads:
            torch.nn.init.normal_(head.weight, std=3.0)
        info = StepInfo(
            **{"architecture": architecture, "head_sizes": heads, "method": "star", "dataset": "voc"},
            **{"names": ["background", "cat", "dog", "cow"][:count], "dataset_ids": [0, 8, 12, 10][:count]},
            **{"task": "t", "step": step, "setting": "overlap", "seed": 0, "compat": None, "base": 2, "crop": 64},
            test_fill=0,
        )
        save_step(run / f"step_{step}", model, info, {}, {})
    return run


@pytest.fixture
def step_dir(random_run: Path, tmp_path: Path) -> Path:
    """The last step of :func:`random_run`, to be changed at will."""
    return Path(shutil.copytree(random_run / "step_1", tmp_path / "step_1"))


@pytest.fixture(scope="session")
def write_city() -> Callable[..., Path]:
    """Return a function that writes images of 64 px in Cityscapes' layout, which show road, void and a second class."""

    def write(root: Path, train: int, val: int, ids: Sequence[int] = (11, 26, 33)) -> Path:
        rng = np.random.default_rng(0)
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                city = ("aachen", "ulm")[i % 2]
                mask = np.full((64, 64), 7, np.uint8)
                mask[:8] = rng.choice([0, 1, 4, 9, 14, 29, 30], (8, 64))
                mask[24:56, 8:40] = ids[i % len(ids)]
                image = (mask[..., None] * np.array([7, 5, 3]) + rng.integers(0, 20, (64, 64, 3))).astype(np.uint8)
                for folder, suffix, array in (
                    ("leftImg8bit", "leftImg8bit", image),
                    ("gtFine", "gtFine_labelIds", mask),
                ):
                    path = root / folder / split / city / f"{city}_{i:06d}_000019_{suffix}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(array).save(path)
        return root

    return write
