"""The question that ends `starseg learn` where the values in the masks and the class list do not fit each other."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from starseg.data.annotations.classlist import ClassList, is_background
from starseg.tasks import BACKGROUND, IGNORE

if TYPE_CHECKING:
    from starseg.finetuning.prepare import LearnRequest

_Answer = tuple[str, bool, tuple[int, ...]]
"""Class list, whether there is a background, and ignored values."""
# More values without a name are listed instead of ignored: they point to another list or another kind of masks.
_MOST_IGNORED = 3
_MOST_ANSWERS = 3
# A list of at least so many names is doubted if value 0 is rarer than another one.
_DOUBTED = 3


@dataclass(frozen=True)
class _Reading:
    """One way to read the masks.

    Attributes:
        meaning: of value 0.
        first: value of the first name.
        background: whether the masks have a background.
        ignored: values of ignored pixels.
    """

    meaning: str
    first: int
    background: bool
    ignored: tuple[int, ...] = ()


def values_in_masks(classes: ClassList, table: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return pixel counts by value in the masks.

    Args:
        classes: the class list.
        table: [256] uint8, dataset ids by class index.
        pixels: [256] counts by dataset id.

    Returns:
        [256] counts by value; those of ignored values are not known, and 255 stands for all of them.
    """
    counts = np.zeros(256, np.int64)
    counts[IGNORE] = pixels[IGNORE]
    for value, index in classes.labels.classes.items():
        counts[value] = pixels[table[index]]
    return counts


def describe_values(classes: ClassList) -> str:
    """Return what the first two values of a class list are, such as "0 is the background and 1 is cat"."""
    first = sorted(classes.labels.classes.items())[:2]
    return " and ".join(f"{value} is {classes.names[index] if index else 'the background'}" for value, index in first)


def mismatch(request: LearnRequest, classes: ClassList, found: np.ndarray, absent: Sequence[str]) -> str:
    """Ask how values and names belong together where they differ, with the likely answers as commands.

    Args:
        request: arguments of the command.
        classes: the class list.
        found: [256] pixel counts by value in the masks.
        absent: names of new classes that no mask shows.

    Returns:
        The question, as lines after a message; empty if there is nothing to ask.
    """
    # Ignored values are not counted one by one; 0 matters, because it may be something else.
    values = sorted({*np.flatnonzero(found[:IGNORE]).tolist(), *(classes.ignored & {BACKGROUND})})
    unknown = [v for v in values if v not in classes.labels.classes and v not in classes.ignored]
    if classes.colours is not None or not (unknown or absent):
        return ""
    if classes.numbered:
        answers = dict(_numbered_answers(classes, unknown))
    else:
        answers = {} if any("," in name for name in classes.names) else dict(_answers(classes, values))
    return _question(request, answers) if answers else ""


def doubt(request: LearnRequest, classes: ClassList, found: np.ndarray) -> str | None:
    """Ask what value 0 is where a list that does not name the background fits the masks, but may be one off.

    Masks without a background whose highest value stands for unlabelled pixels have as many values as masks with a
    background. A background is usually the most frequent value, and void is usually 255 where 0 is the background.

    Args:
        request: arguments of the command.
        classes: the class list, without colours.
        found: [256] pixel counts by value in the masks.
    """
    last = len(classes.names) - 1
    sure = os.path.isfile(classes.source) or is_background(classes.source.split(",")[0].strip())
    if sure or classes.values is not None or classes.ignored or last < _DOUBTED:
        return None
    if found[IGNORE] or not found[: last + 1].all() or found[BACKGROUND] > found[1:].max():
        return None
    first, names = classes.names[1], ",".join(classes.names[1:])
    with_background, without = (f"background,{names}", True, ()), (names, False, (last,))
    answers = {
        with_background: f"0 is the background, and {first} is 1",
        without: f"the masks have no background, {first} is 0, and {last} is not labelled",
    }
    return (
        f"--classes {names}: 0 would be the background, 1 {first} and {last} {classes.names[last]}, but in the masks "
        f"of {request.masks} a class has more pixels than 0{_question(request, answers)}"
    )


def _question(request: LearnRequest, answers: Mapping[_Answer, str]) -> str:
    """Return the lines of the question, from answers and what they mean."""
    shown = [*answers.items()][:_MOST_ANSWERS]
    lines = [f"  - {meaning}:\n      {_command(request, *answer)}" for answer, meaning in shown]
    return "\n".join(["\nWhich of these is right?", *lines])


def _answers(classes: ClassList, values: Sequence[int]) -> Iterator[tuple[_Answer, str]]:
    """Yield the answers for a list whose order is that of the values and their meaning, the best first."""
    names, labels = classes.names[1:], classes.labels
    kept = tuple(sorted(classes.ignored - {BACKGROUND}))
    readings = [
        _Reading("0 is the background", 1, True, kept),
        _Reading(f"the masks have no background, and 0 is {names[0]}", 0, False, kept),
        _Reading("0 is not labelled", 1, True, (BACKGROUND, *kept)),
    ]
    found = []
    for reading in readings:
        wanted = range(reading.first, reading.first + len(names))
        unknown = tuple(v for v in values if v not in wanted and not (v == BACKGROUND and reading.background))
        rest = [v for v in wanted if v not in values]
        shorter = names[: len(names) - len(rest)]
        if (
            not shorter
            or {*kept} & {*wanted}
            or (rest and rest[0] != reading.first + len(shorter))
            or len(unknown) > _MOST_IGNORED
        ):
            continue
        if BACKGROUND not in reading.ignored or BACKGROUND in values:
            found.append((len(unknown) + len(rest), reading, shorter, unknown))
    for _, reading, shorter, unknown in sorted(found, key=lambda item: item[0]):
        also = f", {_listed(unknown)} not labelled" if unknown else ""
        also += f", and there is no {_listed(names[len(shorter) :])}" if len(shorter) < len(names) else ""
        named = ("background",) if reading.background and BACKGROUND not in reading.ignored else ()
        ignored = tuple(sorted({*reading.ignored, *unknown}))
        yield (",".join((*named, *shorter)), reading.background, ignored), f"{reading.meaning}{also}"
        given = labels.classes.get(reading.first) == 1 and (BACKGROUND in labels.ignored) == (
            BACKGROUND in reading.ignored
        )
        last = reading.first + len(names)
        if given and unknown and unknown == tuple(range(last, last + len(unknown))):
            more = (*named, *names, *(f"NAME{v}" for v in unknown))
            yield (
                (",".join(more), reading.background, reading.ignored),
                f"{_listed(unknown)} has no name yet: give it one",
            )


def _numbered_answers(classes: ClassList, unknown: Sequence[int]) -> Iterator[tuple[_Answer, str]]:
    """Yield the answer for a list that gives the values: what it does not name is not labelled."""
    if 0 < len(unknown) <= _MOST_IGNORED:
        ignored = tuple(sorted({*classes.ignored, *unknown}))
        yield (classes.source, True, ignored), f"{_listed(unknown)} not labelled (otherwise name {_listed(unknown)})"


def _listed(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _command(request: LearnRequest, classes: str, background: bool, ignored: Sequence[int]) -> str:
    """Return the command of a request with another class list."""
    words: list[object] = ["starseg", "learn", request.source or "--new", "--images", request.images]
    words += ["--masks", request.masks, "--classes", classes]
    words += [] if background else ["--no-background"]
    for value in ignored:
        words += ["--ignore", value]
    words += ["--out", request.out]
    defaults = type(request).__dataclass_fields__
    given = ("method", "backbone", "pretrained", "crop", "epochs", "lr", "val_share", "seed")
    for name in (*given, "photos", "part_of", "replace"):
        value = getattr(request, name)
        if value != defaults[name].default:
            text = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            words += [f"--{name.replace('_', '-')}", text]
    return shlex.join(map(str, words))
