"""The walk-throughs of docs/adopt.md run as they stand, on small networks with random weights."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starseg.cli.main import main
from starseg.data.images import read_mask
from starseg.models.builders import load_plugins
from starseg.models.foreign.module import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "adopt.md"
PACKAGES = {"segmentation_models.pytorch": "segmentation_models_pytorch", "Your own network": "torch"}
HEART, PHOTOS = 5, 30


def _blocks(title: str) -> list[tuple[str, str]]:
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)^## ", PAGE.read_text(), re.M | re.S)
    return re.findall(r"^```(\w*)\n(.*?)^```", section, re.M | re.S)


@pytest.fixture
def folder(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with photos, and with horses: hearts, whose masks label nothing else."""
    for name in ("photos", "horses", "horse_masks"):
        (tmp_path / name).mkdir()
    for image in sorted((shapes / "JPEGImages").glob("val*"))[:2]:
        shutil.copy(image, tmp_path / "photos")
    for mask in sorted(shapes.glob("SegmentationClassAug/*.png"))[:PHOTOS]:
        if (ids := np.asarray(read_mask(mask)) == HEART).any():
            Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "horse_masks" / mask.name)
            shutil.copy(shapes / "JPEGImages" / f"{mask.stem}.jpg", tmp_path / "horses")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _run(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of a terminal; small images and one epoch make it quick."""
    words = shlex.split(line, comments=True)
    if words[0] == "export":
        monkeypatch.setenv(*words[1].split("="))
        return
    quick = {"learn": ["--epochs", "1"], "adopt": ["--crop", "64"]}.get(words[1], [])
    monkeypatch.setattr(sys, "argv", [*words, *quick])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code, line


@pytest.mark.parametrize("title", ["torchvision", "segmentation_models.pytorch", "transformers", "Your own network"])
def test_walk_through(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(PACKAGES.get(title, title))
    names: dict[str, object] = {}
    known = dict(MODELS)
    commands = 0
    load_plugins.cache_clear()
    for language, text in _blocks(title):
        if language == "python" and (file := re.match(r"# (\w+\.py)\n", text)):
            (folder / file[1]).write_text(text)
        elif language == "python":
            exec(text, names)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                _run(line, monkeypatch)
                commands += 1
    assert commands >= 3
    assert len(list(folder.glob("*_masks/*.png"))) == 2 + len(list(folder.glob("horses/*")))
    assert len(list(folder.glob("*_export/README.md"))) == 1
    for name in MODELS.keys() - known.keys():
        del MODELS[name]
