"""The walk-throughs of docs/adopt.md run as they stand, on small networks with random weights."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from starseg.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "adopt.md"
PACKAGES = {"torchvision": "torchvision", "segmentation_models.pytorch": "segmentation_models_pytorch"}


def _blocks(title: str) -> list[tuple[str, str]]:
    (section,) = re.findall(rf"^## {re.escape(title)}\n(.*?)^## ", PAGE.read_text(), re.M | re.S)
    return re.findall(r"^```(\w*)\n(.*?)^```", section, re.M | re.S)


@pytest.mark.parametrize("title", ["torchvision", "segmentation_models.pytorch", "transformers"])
def test_walk_through(title: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(PACKAGES.get(title, title))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for image in sorted((shapes / "JPEGImages").glob("val*"))[:2]:
        shutil.copy(image, tmp_path / "photos")
    commands = 0
    for language, text in _blocks(title):
        if language == "python":
            exec(text, {})
            continue
        for line in text.replace("\\\n", " ").splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code, line
            commands += 1
    assert commands >= 2
    assert len(list(tmp_path.glob("*_masks/*.png"))) == 2
