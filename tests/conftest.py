"""Shared fixtures. Tests never touch the user's cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("STARSEG_SHARED") or Path(__file__).parents[2] / "shared")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STARSEG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def voc_subset() -> Path:
    """The real VOC subset."""
    root = SHARED / "data" / "PascalVOC2012"
    if not root.is_dir():
        pytest.skip(f"needs the real VOC subset at {root}; set STARSEG_SHARED to the folder that holds data/")
    return root


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny drawn data set of 5 classes."""
    from starseg.data.shapes import write_shapes

    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", train=48, val=12, size=64, classes=5)


@pytest.fixture
def tiny(shapes: Path, tmp_path: Path) -> dict:
    """Settings of a run that takes seconds: steps [disc, square, triangle], [hexagon], [heart] at 64 px."""
    return {
        "method": "star",
        "out": str(tmp_path / "run"),
        "data": {"root": str(shapes), "crop": 64},
        "task": {"name": "tiny", "steps": [["disc", "square", "triangle"], ["hexagon"], ["heart"]]},
        "model": {"backbone": "test_resnet", "pretrained": False},
        "train": {"batch_size": 4, "base": {"epochs": 1, "lr": 0.01}, "later": {"epochs": 1, "lr": 0.001}},
    }


@pytest.fixture
def step_dir(tmp_path: Path) -> Path:
    """A step with random weights whose dataset ids are not its training ids."""
    from starseg.engine.checkpoint import StepInfo, save_step
    from starseg.models import Segmenter

    model = Segmenter("test_resnet", [2, 1]).eval()
    for head in model.heads:
        torch.nn.init.normal_(head.weight, std=3.0)
    info = StepInfo(
        **{"backbone": "test_resnet", "output_stride": 16, "head_sizes": [2, 1], "method": "star", "dataset": "voc"},
        **{"names": ["background", "cat", "dog", "cow"], "dataset_ids": [0, 8, 12, 10], "task": "t", "step": 1},
        **{"setting": "overlap", "seed": 0, "compat": None, "base": 2, "crop": 64, "test_fill": 0},
    )
    save_step(tmp_path / "step_1", model, info, {}, {})
    return tmp_path / "step_1"
