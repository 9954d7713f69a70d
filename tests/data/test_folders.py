"""Files of a folder: links are followed once, and what cannot be followed is named."""

import os
from pathlib import Path

import pytest
from PIL import Image

from starseg.data.folders import list_files
from starseg.errors import UserError
from starseg.inference.files import find_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files in a folder, in a linked folder and in a hidden one, and a linked file."""
    for name in ("in/a.jpg", "in/deep/b.jpg", "in/.hidden/c.jpg", "in/.d.jpg", "out/e.jpg", "out/more/f.jpg", "g.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
    (tmp_path / "in" / "g.jpg").symlink_to(tmp_path / "g.jpg")
    return tmp_path / "in"


def _names(files: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in files]


def test_linked_files_and_folders_are_listed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    every = ["a.jpg", "deep/b.jpg", "g.jpg", "linked/e.jpg", "linked/more/f.jpg"]
    assert _names(list_files(folder), folder) == every
    assert _names(list_files(folder, deep=False), folder) == ["a.jpg", "g.jpg"]
    without = _names(list_files(folder, skip=[folder.parent / "out" / "more", folder / "deep"]), folder)
    assert without == ["a.jpg", "g.jpg", "linked/e.jpg"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("target", [".", "..", "../in"])
def test_links_in_a_circle_end(folder: Path, target: str, capsys: pytest.CaptureFixture) -> None:
    (folder.parent / "out" / "more" / "back").symlink_to(folder)
    (folder / "deep" / "up").symlink_to(folder / target, target_is_directory=True)
    assert set(_names(list_files(folder), folder)) >= {"a.jpg", "deep/b.jpg", "linked/more/f.jpg"}
    err = capsys.readouterr().err
    assert "note: left out, as they are links to folders that contain them: " in err and "linked/more/back" in err
    assert "deep/up" in err


def test_links_that_lead_nowhere_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "lost.jpg").symlink_to("/nowhere/lost.jpg")
    (folder / "own.jpg").symlink_to(folder / "own.jpg")
    (folder / "deep" / "monday").symlink_to("/nowhere/monday")
    os.mkfifo(folder / "pipe.jpg")
    assert len(list_files(folder)) == 5
    err = capsys.readouterr().err
    named = [f"{folder}/{name}" for name in ("deep/monday", "lost.jpg", "own.jpg", "pipe.jpg")]
    assert err == f"note: left out, as they are no files or links that lead nowhere: {', '.join(named)}\n"


def test_predict_names_links_that_lead_nowhere(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "lost.jpg").symlink_to("/nowhere/lost.jpg")
    for source in (str(folder), f"{folder}/*"):
        assert _names(find_images([source]), folder) == ["a.jpg", "g.jpg"]
        assert f"{folder}/lost.jpg" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path.iterdir

    def iterdir(path: Path):
        if path.name == "deep":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"in/deep: cannot read this folder \(Permission denied\)"):
        list_files(folder)
