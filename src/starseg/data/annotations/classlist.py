"""Class lists of a user's own masks: a text or YAML file, CVAT's labelmap.txt, Cityscapes' labels.py, or names."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from starseg.data.datasets.base import clean_name, distinct, read_lines
from starseg.data.labels import LabelMap
from starseg.errors import UserError
from starseg.tasks import IGNORE
from starseg.utils.files import read_text

Colour = tuple[int, int, int]
_LINE = re.compile(r"(?P<name>.+?)(?:\s+#(?P<hex>[0-9a-fA-F]{6})|(?P<rgb>(?:[\s,]+\d+){3}))?")
_HASH = re.compile(r"(^|\s)#")
_LABEL_MAP_LINE = re.compile(r"(?P<name>[^:#][^:]*):(?P<rgb>\d+,\d+,\d+):[^:]*:[^:]*")
# A row of the table in cityscapesscripts/helpers/labels.py: name, id, trainId, category, categoryId, hasInstances,
# ignoreInEval, color. The file is not executed.
_TABLE_ROW = re.compile(
    r"^\s*Label\(\s*(?P<quote>['\"])(?P<name>[^'\"]+)(?P=quote)\s*,\s*(?P<id>-?\d+)\s*,\s*-?\d+\s*,[^,()]+,[^,()]+,[^,()]+,"
    r"\s*(?P<ignored>True|False)\s*,\s*\((?P<rgb>[\s\d,]+)\)\s*\)",
    re.M,
)
_NUMBERED_LINE = re.compile(r"(?P<value>\d{1,9})\s+(?P<rest>\D.*)")
_BLACK = (0, 0, 0)
_DIGITS = 9
_BACKGROUND = "background"
_YAML = (".yaml", ".yml")
_KEYS = {"id", "name", "colour", "color", "ignored"}
# What Labelme's lists begin with; the label in its annotations stands for ignored pixels.
_IGNORED = "__ignore__"


class Entry(NamedTuple):
    """An entry of a class list: the name, and where the list gives them, the colour and the value in the masks."""

    name: str
    colour: Colour | None = None
    value: int | None = None
    ignored: bool = False


@dataclass(frozen=True)
class ClassList:
    """The classes that appear in masks.

    Attributes:
        names: class names by index, the background first.
        colours: colour of each class, if masks are read by colour; None if pixels are values.
        source: where the list comes from, for error messages.
        label_map: whether the list is from CVAT, which writes no mask for an image without annotations.
        values: index of each class by its value in the masks; None if values are indices.
        ignored: values of ignored pixels, in addition to 255.
        ignored_colours: colours of ignored pixels.
        background: whether the masks have a background. If not, index 0 is no class, and pixels that are not annotated
            are ignored.
        numbered: whether the list gives the values, so that even with colours, 8-bit masks are read by value.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] | None
    source: str
    label_map: bool = False
    values: Mapping[int, int] | None = None
    ignored: frozenset[int] = frozenset()
    ignored_colours: tuple[Colour, ...] = ()
    background: bool = True
    numbered: bool = False

    @property
    def labels(self) -> LabelMap:
        """Mapping from values in the masks to indices."""
        return LabelMap.make(len(self.names), self.values, self.ignored)


def read_classes(given: str, background: bool = True, ignored: Collection[int] = ()) -> ClassList:
    """Read a class list from a file, or from names such as "horse,cow".

    A text file has a line per class, ``name``, ``name R G B`` or ``name #rrggbb``. Values in the masks are the
    positions in the list, the background first, unless every line begins with a value (``7 road``, ``0 ignored``). The
    background is black by default. Labelme's list may begin with ``__ignore__``. CVAT's labelmap.txt has lines
    ``name:R,G,B:parts:actions`` in any order. Cityscapes' labels.py has a row per class, with ids, colours and which
    classes are ignored. A YAML file is a list of names, or of entries with ``id``, ``name``,
    ``colour`` and ``ignored``; or it contains such a list as ``classes``, or names by value as ``names``.

    Args:
        given: path of the file, or comma-separated names.
        background: whether the masks have a background; if not, value 0 is the first name. A list that gives the values
            has one if it names one.
        ignored: values of ignored pixels, in addition to 255. If 0 is among them, there is no background.

    Raises:
        UserError: the file does not exist or is invalid, the background or all other classes are missing, a name is
            empty, a name, value or colour occurs twice, a colour or value is invalid, an ignored value is a class, or
            only some classes have a colour or a value.
    """
    path, label_map = Path(given), False
    # Path.is_file() would raise an error on names longer than those of files.
    if os.path.isfile(path):
        entries, label_map = _read_file(path)
    elif "/" in given or path.suffix in (".txt", ".py", *_YAML):
        raise UserError(f"--classes {given}: no such file; give a file, or names with commas between them")
    else:
        names = [name.strip() for name in given.split(",")]
        if "" in names:
            raise UserError(
                f"--classes {given}: name {names.index('') + 1} of {len(names)} is empty; a name's place is its value "
                "in the masks, so name every class, or leave the comma out"
            )
        entries = [_parse(name, path) for name in names]
        if background and not is_background(entries[0].name):
            entries.insert(0, Entry(_BACKGROUND))
    if not background and (named := [entry.name for entry in entries if is_background(entry.name)]):
        raise UserError(f"--no-background: --classes {given} names {named[0]!r}; take it out, or leave the option out")
    numbered = any(entry.value is not None for entry in entries)
    classes = _class_list(_with_values(entries, background, given), given, ignored)
    return replace(classes, label_map=label_map, numbered=numbered)


def _with_values(entries: Sequence[Entry], background: bool, given: str) -> list[Entry]:
    """Return the entries with the background first if there is one, all with a value.

    Raises:
        UserError: only some have a value, or a list without values does not begin with the background.
    """
    bare = [entry.name for entry in entries if entry.value is None and not entry.ignored]
    if not any(entry.value is not None for entry in entries):
        if background and (not entries or not is_background(entries[0].name)):
            raise UserError(
                f"{given}: its first line must be 'background', which index 0 in the masks stands for, got "
                f"{entries[0].name if entries else 'an empty file'!r}; add it, or give --no-background if 0 is that "
                "class"
            )
        return [entry._replace(value=value) for value, entry in enumerate(entries)]
    if bare:
        raise UserError(f"{given}: these classes have no value while others have one: {', '.join(bare)}; give all one")
    return sorted(entries, key=lambda entry: not is_background(entry.name))


def _class_list(entries: Sequence[Entry], given: str, ignored: Collection[int]) -> ClassList:
    """Return the class list of entries with values; see :func:`read_classes`."""
    values = [entry.value for entry in entries if entry.value is not None]
    _check_values(entries, values, given, ignored)
    skipped = {entry.value for entry in entries if entry.ignored and entry.value is not None} | set(ignored)
    shown = [
        entry for entry in entries if not entry.ignored and not (is_background(entry.name) and entry.value in skipped)
    ]
    background = bool(shown) and is_background(shown[0].name)
    if not background:
        shown.insert(0, Entry(_BACKGROUND))
    if len(shown) < 2:
        raise UserError(f"--classes {given}: expected at least one class beside the background")
    names = tuple(clean_name(entry.name) for entry in shown)
    distinct([name.casefold() for name in names], Path(given))
    by_value = {entry.value: index for index, entry in enumerate(shown) if entry.value is not None}
    return ClassList(
        names,
        _colour_map(names, [entry.colour for entry in shown], Path(given), background),
        given,
        values=None if by_value == {index: index for index in range(len(names))} else by_value,
        ignored=frozenset(skipped - {IGNORE}),
        ignored_colours=tuple(entry.colour for entry in entries if entry.ignored and entry.colour),
        background=background,
    )


def _check_values(entries: Sequence[Entry], values: Sequence[int], given: str, ignored: Collection[int]) -> None:
    """Refuse values that are not distinct or not from 0 to 254, and ignored values of classes."""
    if wrong := [value for value in ignored if not 0 <= value <= IGNORE]:
        raise UserError(f"--ignore {wrong[0]}: expected a value in the masks, from 0 to 254 (255 is always ignored)")
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise UserError(f"{given}: gives the value {twice[0]} to two classes; give every class a value of its own")
    classes = [entry for entry in entries if not entry.ignored]
    if high := [entry for entry in classes if entry.value is not None and entry.value >= IGNORE]:
        raise UserError(f"{given}: {high[0].name} has the value {high[0].value}; expected 0 to 254, as 255 is ignored")
    if both := [entry for entry in classes if entry.value in ignored and not is_background(entry.name)]:
        raise UserError(
            f"--ignore {both[0].value}: is the value of {both[0].name} in --classes {given}; leave the option out, or "
            "give the values in a file as --classes ('7 road' a line)"
        )


def _read_file(path: Path) -> tuple[list[Entry], bool]:
    """Return the entries of a file, and whether it is CVAT's labelmap.txt."""
    if path.suffix.lower() in _YAML:
        return _read_yaml(path), False
    if path.suffix.lower() == ".py":
        return _read_table(path), False
    lines = read_lines(path, "--classes: a class a line, the background first")
    lines = lines[lines[:1] == [_IGNORED] :]
    if any(_LABEL_MAP_LINE.fullmatch(line) for line in lines):
        return _read_label_map(lines, path), True
    numbered = [match for line in lines if (match := _NUMBERED_LINE.fullmatch(line))]
    if lines and len(numbered) == len(lines):
        parsed = [_parse(match["rest"], path)._replace(value=int(match["value"])) for match in numbered]
        return [entry._replace(ignored=_means_ignored(entry.name)) for entry in parsed], False
    return [_parse(line, path) for line in lines], False


def _read_table(path: Path) -> list[Entry]:
    """Return the entries of Cityscapes' labels.py; rows with a negative id, which no mask shows, are left out."""
    rows = list(_TABLE_ROW.finditer("\n".join(read_lines(path, "--classes: a class list"))))
    if not rows:
        raise UserError(
            f"{path}: expected rows \"Label('road', 7, 0, 'flat', 1, False, False, (128, 64, 128))\" as in "
            "Cityscapes' labels.py"
        )
    return [
        Entry(row["name"].strip(), _read_colour(row["rgb"], row[0], path), int(row["id"]), row["ignored"] == "True")
        for row in rows
        if int(row["id"]) >= 0
    ]


def _means_ignored(name: str) -> bool:
    return name.casefold().strip("_") in ("ignore", "ignored")


def _read_yaml(path: Path) -> list[Entry]:
    """Return the entries of a YAML file, see :func:`read_classes`."""
    expected = "expected a list of names or of entries with id, name, colour and ignored, or 'names' by value"
    try:
        tree = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot read this list ({str(error).splitlines()[0]}); {expected}") from error
    if isinstance(tree, dict) and isinstance(tree.get("names"), list):
        tree = dict(enumerate(tree["names"]))
    elif isinstance(tree, dict):
        tree = tree.get("names", tree.get("classes", tree))
    if isinstance(tree, dict):
        tree = [{"id": value, "name": name} for value, name in tree.items()]
    if not isinstance(tree, list) or not tree:
        raise UserError(f"{path}: {expected}")
    return [_yaml_entry(row, path, expected) for row in tree]


def _yaml_entry(row: Any, path: Path, expected: str) -> Entry:
    if isinstance(row, str):
        return _parse(row, path)
    if not isinstance(row, dict) or not row.keys() <= _KEYS or not isinstance(row.get("name"), str):
        raise UserError(f"{path}: {expected}; got {row!r}")
    value, ignored, colour = row.get("id"), row.get("ignored", False), row.get("colour", row.get("color"))
    if not (value is None or (isinstance(value, int) and value >= 0)) or not isinstance(ignored, bool):
        raise UserError(f"{path}: expected an id from 0 to 254, and true or false as ignored, got {row!r}")
    if colour is not None:
        text = " ".join(map(str, colour)) if isinstance(colour, list) else str(colour)
        colour = _parse(f"colour {text}", path).colour
        if colour is None:
            raise UserError(f"{path}: expected a colour such as '#c00080' or [192, 0, 128], got {row!r}")
    return Entry(row["name"], colour, value, ignored or _means_ignored(row["name"]))


def is_background(name: str) -> bool:
    """Return whether a class name denotes the background, whatever its case and surrounding underscores."""
    return name.casefold().strip("_") == "background"


def _parse(line: str, path: Path) -> Entry:
    """Return the entry in a line of a class list, without its value."""
    match = _LINE.fullmatch(line)
    if not match or _HASH.search(match["name"]):
        raise UserError(f"{path}: expected 'name', 'name R G B' or 'name #rrggbb', got {line!r}")
    if match["hex"]:
        red, green, blue = bytes.fromhex(match["hex"])
        return Entry(match["name"], (red, green, blue))
    if not match["rgb"]:
        return Entry(line)
    return Entry(match["name"], _read_colour(match["rgb"], line, path))


def _read_colour(text: str, line: str, path: Path) -> Colour:
    numbers = re.findall(r"\d+", text)
    if any(len(number) > _DIGITS or int(number) > 255 for number in numbers):
        raise UserError(f"{path}: expected colours of three numbers from 0 to 255, got {line!r}")
    red, green, blue = map(int, numbers)
    return red, green, blue


def _read_label_map(lines: Sequence[str], path: Path) -> list[Entry]:
    """Return the entries of CVAT's labelmap.txt, in its order (by name) but with the background first."""
    entries: list[Entry] = []
    for line in lines:
        if match := _LABEL_MAP_LINE.fullmatch(line):
            entries.append(Entry(match["name"].strip(), _read_colour(match["rgb"], line, path)))
        elif not line.startswith("#"):
            raise UserError(f"{path}: expected 'name:R,G,B:parts:actions' as in CVAT's labelmap.txt, got {line!r}")
    if not any(is_background(entry.name) for entry in entries):
        entries.append(Entry(_BACKGROUND, _BLACK))
    return sorted(entries, key=lambda entry: not is_background(entry.name))


def _colour_map(
    names: Sequence[str], colours: Sequence[Colour | None], path: Path, background: bool
) -> tuple[Colour, ...] | None:
    if not any(colours[1:]):
        return None
    found = [colours[0] or _BLACK, *colours[1:]]
    if bare := [name for name, colour in zip(names, found, strict=True) if colour is None]:
        raise UserError(f"{path}: these classes have no colour while others have one: {', '.join(bare)}; give all one")
    shown = found if background else found[1:]
    if len(set(shown)) < len(shown):
        raise UserError(f"{path}: two classes have the same colour; give every class a colour of its own")
    return tuple(c for c in found if c)
