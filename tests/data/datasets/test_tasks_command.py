"""`starseg tasks`, and further names of published tasks."""

from dataclasses import replace
from pathlib import Path

import pytest

from commands import command
from starseg.config import parse_config
from starseg.data.datasets import find_dataset
from starseg.data.datasets.voc import VOC, VOC_NAMES
from starseg.engine.setup import resolve_config


def test_the_tasks_of_a_data_set(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert command(monkeypatch, "tasks", "voc") == 0
    rows = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["15-1"] == "15-1 15-5s 6 15, 5 steps of 1"
    assert (
        rows["2-2"] == "2-2 10 10 steps of 2"
        and rows["4-2"] == "4-2 9 4, 8 steps of 2"
        and rows["10-1"] == "10-1 11 10, 10 steps of 1"
    )
    assert rows["joint"] == "joint offline 1 20" and rows["15-1_w"] == "15-1_w 15-5s_w 6 15, 5 steps of 1"
    assert rows["published:"] == "published: 10,582 training and 1,449 test images"
    assert command(monkeypatch, "tasks", "ade") == 0
    assert "100-5 11 100, 10 steps of 5" in " ".join(capsys.readouterr().out.split())
    assert command(monkeypatch, "tasks", "folder") == 0
    assert "no published tasks" in capsys.readouterr().out


def test_the_steps_of_a_task(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, shapes: Path) -> None:
    monkeypatch.chdir(shapes.parent)
    assert command(monkeypatch, "tasks", "voc", "15-5s") == 0
    text = capsys.readouterr().out
    assert "PASCAL VOC 2012 15-1, overlap" in text and "5     tvmonitor" in text and "--root FOLDER counts" in text
    monkeypatch.setattr(
        "starseg.data.datasets.DATASETS", {"voc": replace(VOC, tasks={"4-1": ((1, 2, 3, 4), (5,))}, aliases={})}
    )
    assert command(monkeypatch, "tasks", "voc", "4-1", "--root", shapes) == 0
    text = capsys.readouterr().out
    assert "training images" in text and "heart" in text
    _, *counts = next(line for line in text.splitlines() if line.startswith("1 ")).rsplit(maxsplit=2)
    assert all(0 < int(n) <= 48 for n in counts)
    for setting in ("overlap", "disjoint"):
        assert command(monkeypatch, "tasks", "voc", "--root", shapes, "--setting", setting) == 0
        text = capsys.readouterr().out
        row = next(line.split() for line in text.splitlines() if line.startswith("4-1 "))
        assert all(0 < int(n.strip(",")) <= 48 for n in row[-2:])
        assert next(line.split() for line in text.splitlines() if line.startswith("4-2 "))[-1] == "-"
    assert command(monkeypatch, "tasks", "voc", "--root", shapes, "--setting", "domain") == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nosuch"], "unknown data set 'nosuch'"),
        (["voc", "7-7"], "unknown task '7-7'"),
        (["voc", "15-1", "--setting", "both"], "has no setting 'both'"),
        (["voc", "15-1", "--root", "/nowhere"], "data.root must be a folder in the VOC layout"),
    ],
)
def test_what_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, args: list[str], message: str
) -> None:
    assert command(monkeypatch, "tasks", *args) == 2
    assert message in capsys.readouterr().err


def test_an_alias_is_the_task(tmp_path: Path) -> None:
    def resolved(name: str) -> dict:
        tree = {
            "out": str(tmp_path),
            "data": {"dataset": "voc"},
            "task": {"name": name},
            "model": {"pretrained": False},
        }
        return resolve_config(parse_config(tree | {"method": "plop"}))[0].model_dump()

    assert resolved("15-5s") == resolved("15-1") and resolved("offline") == resolved("joint")
    assert VOC.task(VOC_NAMES, "15-5s") == VOC.task(VOC_NAMES, "15-1")
    assert find_dataset("ade").aliases["50"] == "50-50"
    with pytest.raises(ValueError, match="aliases name tasks that it does not have: 16-1"):
        replace(VOC, aliases={"16-1s": "16-1"})
