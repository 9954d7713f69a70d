"""Class lists of a user's own masks: a text file, CVAT's labelmap.txt, or comma-separated names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starseg.data.datasets.base import clean_name, distinct, read_lines
from starseg.errors import UserError

Colour = tuple[int, int, int]
_LINE = re.compile(r"(?P<name>.+?)(?:\s+#(?P<hex>[0-9a-fA-F]{6})|(?P<rgb>(?:[\s,]+\d+){3}))?")
_HASH = re.compile(r"(^|\s)#")
_LABEL_MAP_LINE = re.compile(r"(?P<name>[^:#][^:]*):(?P<rgb>\d+,\d+,\d+):[^:]*:[^:]*")
_BLACK = (0, 0, 0)
_DIGITS = 9
# What Labelme's lists begin with; the label in its annotations stands for ignored pixels.
_IGNORED = "__ignore__"


@dataclass(frozen=True)
class ClassList:
    """The classes that appear in masks.

    Attributes:
        names: class names by index in the masks, the background first.
        colours: colour of each class, if masks are read by colour; None if pixels are class indices.
        source: where the list comes from, for error messages.
        label_map: whether the list is from CVAT, which writes no mask for an image without annotations.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] | None
    source: str
    label_map: bool = False


def read_classes(given: str) -> ClassList:
    """Read a class list from a file with one class per line, the background first, or from names such as "horse,cow".

    A line is ``name``, ``name R G B`` or ``name #rrggbb``; the background is black by default. Labelme's list may begin
    with ``__ignore__``. CVAT's labelmap.txt has lines ``name:R,G,B:parts:actions`` in any order.

    Args:
        given: path of the file, or comma-separated names.

    Raises:
        UserError: the file does not exist, the background or all other classes are missing, a name is empty, a name or
            colour occurs twice, a colour is invalid, or only some classes have a colour.
    """
    path, label_map = Path(given), False
    # Path.is_file() would raise an error on names longer than those of files.
    if os.path.isfile(path):
        lines = read_lines(path, "--classes: a class a line, the background first")
        lines = lines[lines[:1] == [_IGNORED] :]
        label_map = any(_LABEL_MAP_LINE.fullmatch(line) for line in lines)
        entries = _read_label_map(lines, path) if label_map else [_parse(line, path) for line in lines]
        if not entries or not is_background(entries[0][0]):
            raise UserError(
                f"{path}: its first line must be 'background', which index 0 in the masks stands for, got "
                f"{lines[0] if lines else 'an empty file'!r}; add it"
            )
    elif "/" in given or path.suffix == ".txt":
        raise UserError(f"--classes {given}: no such file; give a file, or names with commas between them")
    else:
        names = [name.strip() for name in given.split(",")]
        if "" in names:
            raise UserError(
                f"--classes {given}: name {names.index('') + 1} of {len(names)} is empty; a name's place is its value "
                "in the masks, so name every class, or leave the comma out"
            )
        entries = [_parse(name, path) for name in names]
        if not is_background(entries[0][0]):
            entries.insert(0, ("background", None))
    if len(entries) < 2:
        raise UserError(f"--classes {given}: expected at least one class beside the background")
    classes, colours = tuple(clean_name(name) for name, _ in entries), tuple(colour for _, colour in entries)
    distinct([name.casefold() for name in classes], path)
    return ClassList(classes, _colour_map(classes, colours, path), given, label_map)


def is_background(name: str) -> bool:
    """Return whether a class name denotes the background, whatever its case and surrounding underscores."""
    return name.casefold().strip("_") == "background"


def _parse(line: str, path: Path) -> tuple[str, Colour | None]:
    """Return the name and colour in a line of a class list."""
    match = _LINE.fullmatch(line)
    if not match or _HASH.search(match["name"]):
        raise UserError(f"{path}: expected 'name', 'name R G B' or 'name #rrggbb', got {line!r}")
    if match["hex"]:
        return match["name"], tuple(bytes.fromhex(match["hex"]))  # type: ignore[return-value]
    if not match["rgb"]:
        return line, None
    return match["name"], _read_colour(match["rgb"], line, path)


def _read_colour(text: str, line: str, path: Path) -> Colour:
    numbers = re.findall(r"\d+", text)
    if any(len(number) > _DIGITS or int(number) > 255 for number in numbers):
        raise UserError(f"{path}: expected colours of three numbers from 0 to 255, got {line!r}")
    red, green, blue = map(int, numbers)
    return red, green, blue


def _read_label_map(lines: Sequence[str], path: Path) -> list[tuple[str, Colour | None]]:
    """Return the names and colours in CVAT's labelmap.txt, in its order (by name) but with the background first."""
    entries: list[tuple[str, Colour | None]] = []
    for line in lines:
        if match := _LABEL_MAP_LINE.fullmatch(line):
            entries.append((match["name"].strip(), _read_colour(match["rgb"], line, path)))
        elif not line.startswith("#"):
            raise UserError(f"{path}: expected 'name:R,G,B:parts:actions' as in CVAT's labelmap.txt, got {line!r}")
    if not any(is_background(name) for name, _ in entries):
        entries.append(("background", _BLACK))
    return sorted(entries, key=lambda entry: not is_background(entry[0]))


def _colour_map(names: Sequence[str], colours: Sequence[Colour | None], path: Path) -> tuple[Colour, ...] | None:
    if not any(colours[1:]):
        return None
    found = [colours[0] or _BLACK, *colours[1:]]
    if bare := [name for name, colour in zip(names, found, strict=True) if colour is None]:
        raise UserError(f"{path}: these classes have no colour while others have one: {', '.join(bare)}; give all one")
    if len(set(found)) < len(found):
        raise UserError(f"{path}: two classes have the same colour; give every class a colour of its own")
    return tuple(c for c in found if c)
