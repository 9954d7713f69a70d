"""A synthetic data set for published VOC tasks: 10 of 20 classes occur, so that 5-3 has images in steps 0 to 3."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from starseg.compat import commands
from starseg.data.shapes import write_shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def twenty_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_shapes(tmp_path_factory.mktemp("twenty") / "data", train=60, val=12, size=64)
    names = root.joinpath("classes.txt").read_text().split()
    root.joinpath("classes.txt").write_text("\n".join([*names, *(f"absent{i}" for i in range(11, 21))]))
    return root


@pytest.fixture
def published(twenty_classes: Path, tmp_path: Path) -> Path:
    """A published configuration at a tiny size."""
    tree = json.loads((ROOT / "configs/config_voc.json").read_text())
    args = tree["data_loader"]["args"]
    for split in ("train", "val", "test"):
        args[split]["args"]["transform_args"]["crop_size"] = 64
    args["train"]["batch_size"] = 4
    args |= {"root": str(twenty_classes), "task": {"name": "5-3", "step": 0, "allow_absent": True}}
    tree["arch"]["args"] |= {"backbone": "test_resnet", "backbone_pretrained": False}
    tree["use_amp"] = False  # float32, whatever the CPU
    tree["trainer"] |= {"epochs": 2, "save_dir": str(tmp_path / "saved")}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture
def train(published: Path) -> Callable[..., None]:
    """Run train_voc.py's steps with the tiny configuration."""

    def run(step: int, *argv: str) -> None:
        later = ["--freeze_bn", "--lr", "0.0001"] if step else []
        commands.train("voc", ["-c", str(published), "-d", "cpu", "--task_step", str(step), *later, *argv])

    return run
