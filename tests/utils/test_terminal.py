"""Text of users is printed as it is, on terminals of any encoding."""

import io
import os
import sys
from pathlib import Path

import pytest
from rich.table import Table

from starseg.data.datasets.folder import open_folder, write_list
from starseg.errors import UserError
from starseg.report.tables import figures_table
from starseg.utils.progress import bar
from starseg.utils.terminal import labelled, make_console, print_note, reporting_errors

NAMES = [
    "screw [m3]",
    "left [/right]",
    "[red]",
    "[link=x]y[/link]",
    ":smile:",
    "\\[b]",
    "[@click=f]",
    "kůň 马",
    "café\udce9",
]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1250"])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch, name: str, encoding: str) -> None:
    printed = io.BytesIO()
    stream = io.TextIOWrapper(printed, encoding, errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    shown = name.encode(encoding, "backslashreplace")
    console = make_console()
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    values = {name: 50.0}
    with bar(console, name, 1) as progress:
        progress.advance()
        progress.show(name, {"loss": 1.0}, 1)
    with pytest.raises(SystemExit), reporting_errors(debug=False):
        raise UserError(name)
    for show in (
        lambda: console.print(name),
        lambda: console.print(f"a {name} b", highlight=False, soft_wrap=True),
        lambda: console.print(labelled("failed:", "red", name)),
        lambda: console.print(table),
        lambda: console.print(figures_table(name, {"iou": values, "miou": {}})),
        lambda: console.rule(name),
        lambda: print_note(name),
    ):
        before = len(printed.getvalue())
        show()
        assert shown in printed.getvalue()[before:]
    assert printed.getvalue().count(shown) >= 12


def test_a_console_follows_the_current_stream(capsys: pytest.CaptureFixture) -> None:
    console = make_console()
    console.print("one")
    assert capsys.readouterr().out == "one\n"
    make_console(stderr=True).print("two")
    make_console(quiet=True).print("three")
    assert capsys.readouterr() == ("", "two\n")


def test_a_live_bar_prints_through_the_same_console(capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = make_console()
    assert console.is_terminal
    with bar(console, "left [/right]", 2) as shown:
        shown.advance()
        shown.show("[m3]", {}, 1)
        console.print("café\udce9 [x]")
        print("from elsewhere")
    out = capsys.readouterr().out
    assert "left [/right]" in out and "café\\udce9 [x]" in out and "from elsewhere" in out


def test_lists_hold_names_of_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xff")
    image, mask = tmp_path / f"{name}.jpg", Path("masks") / f"{name}.png"
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    for file in ("train.txt", "val.txt"):
        write_list(tmp_path / file, [(image, mask), (tmp_path / "kůň.jpg", Path("masks/kůň.png"))])
    dataset = open_folder(tmp_path)
    assert dataset.train.images == (image, tmp_path / "kůň.jpg")
    assert dataset.train.masks == (tmp_path / mask, tmp_path / "masks" / "kůň.png")
    assert dataset.train == dataset.test
