"""File formats that packages register."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from starseg.engine import formats
from starseg.engine.formats import find_loader, open_network, open_run
from starseg.errors import UserError


def _register(monkeypatch: pytest.MonkeyPatch, *found: EntryPoint) -> None:
    monkeypatch.setattr(formats, "entry_points", lambda group: [e for e in found if e.group == group])


def test_a_file_is_read_by_the_loader_of_its_suffix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = EntryPoint(".pth", "starseg.compat.weights:open_checkpoint", formats.ENTRY_POINTS)
    _register(monkeypatch, ours)
    path = tmp_path / "weights.pth"
    path.touch()
    assert find_loader(".pth") is ours.load() and find_loader(".pt") is None
    for read in (open_network, lambda p: open_run(p, [])):
        with pytest.raises(UserError, match=r"put the config\.json of the download beside the checkpoint"):
            read(path)
    with pytest.raises(UserError, match="there is no checkpoint"):
        open_network(tmp_path / "missing.pth")


def test_an_unknown_format_names_those_that_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _register(monkeypatch, EntryPoint(".pth", "starseg.compat.weights:open_checkpoint", formats.ENTRY_POINTS))
    path = tmp_path / "weights.bin"
    path.touch()
    with pytest.raises(UserError, match=r"no step directory, and no installed package reads \.bin files .*\.pth"):
        open_network(path)


def test_a_broken_entry_point_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _register(monkeypatch, EntryPoint(".bin", "no_such_module_of_mine", formats.ENTRY_POINTS))
    with pytest.raises(UserError, match=r"file format '\.bin' of the installed package \? cannot be loaded"):
        open_network(tmp_path / "weights.bin")


def test_a_step_directory_with_a_dot_in_its_name(random_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_1.old"
    folder.symlink_to(random_run / "step_1")
    assert open_network(folder)[1].step == 1
