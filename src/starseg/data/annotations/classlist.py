"""Class lists of a user's masks: a file, CVAT's labelmap.txt, or names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starseg.data.datasets.base import distinct, read_lines
from starseg.errors import UserError

Colour = tuple[int, int, int]
_LINE = re.compile(r"(?P<name>.+?)(?:\s+#(?P<hex>[0-9a-fA-F]{6})|(?P<rgb>(?:[\s,]+\d+){3}))?")
_HASH = re.compile(r"(^|\s)#")
_LABEL_MAP_LINE = re.compile(r"(?P<name>[^:#][^:]*):(?P<rgb>\d+,\d+,\d+):[^:]*:[^:]*")
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class ClassList:
    """Classes that masks show.

    Attributes:
        names: by index in the masks, the background first.
        colours: of each class, where masks are read by colour; else None, and a pixel is the index of its class.
        source: for messages.
        label_map: from CVAT, which writes no mask for an image without an annotation.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] | None
    source: str
    label_map: bool = False


def read_classes(given: str) -> ClassList:
    """Read a class list from a file (one class per line, the background first) or from names ("horse,cow").

    A line is ``name``, ``name R G B`` or ``name #rrggbb``; black is the background's colour by default. CVAT's
    labelmap.txt has lines ``name:R,G,B:parts:actions`` in any order.

    Raises:
        UserError: no such file, no background, no class, an empty name, a name or colour twice, a colour that is none,
            or some classes without colours.
    """
    path, label_map = Path(given), False
    if path.is_file():
        lines = read_lines(path, "--classes: a class a line, the background first")
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
    classes, colours = zip(*entries, strict=True)
    distinct([name.casefold() for name in classes], path)
    return ClassList(classes, _colour_map(classes, colours, path), given, label_map)


def is_background(name: str) -> bool:
    """Whether a class name means the background."""
    return name.casefold().strip("_") == "background"


def _parse(line: str, path: Path) -> tuple[str, Colour | None]:
    """Parse name and colour of a line."""
    match = _LINE.fullmatch(line)
    if not match or _HASH.search(match["name"]):
        raise UserError(f"{path}: expected 'name', 'name R G B' or 'name #rrggbb', got {line!r}")
    if match["hex"]:
        return match["name"], tuple(bytes.fromhex(match["hex"]))  # type: ignore[return-value]
    if not match["rgb"]:
        return line, None
    return match["name"], _read_colour(match["rgb"], line, path)


def _read_colour(text: str, line: str, path: Path) -> Colour:
    red, green, blue = map(int, re.findall(r"\d+", text))
    if max(red, green, blue) > 255:
        raise UserError(f"{path}: expected colours of three numbers from 0 to 255, got {line!r}")
    return red, green, blue


def _read_label_map(lines: Sequence[str], path: Path) -> list[tuple[str, Colour | None]]:
    """Read names and colours of CVAT's labelmap.txt, sorted by name with the background moved to the front."""
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
