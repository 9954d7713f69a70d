"""Names of the outputs of an adopted network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from starseg.data.annotations.classlist import is_background
from starseg.data.datasets.base import clean_name
from starseg.errors import UserError

_MOST = 254
_PLACEHOLDER = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Outputs:
    """The outputs of a network.

    Attributes:
        names: names of the classes, the background first.
        channels: output of each class, without the background.
        background: output of the background; None if there is none.
        binary: whether the network has a single output, positive for the only class.
    """

    names: list[str]
    channels: list[int]
    background: int | None
    binary: bool = False


def name_outputs(given: str | None, known: Sequence[str] | None, count: int, background: bool, source: str) -> Outputs:
    """Return the names of ``count`` outputs.

    Args:
        given: comma-separated names (``--classes``), which take precedence.
        known: names that come with the weights.
        count: number of outputs.
        background: whether the first of the given names is the background; of known names it is the one so called.
        source: of the network, for messages.

    Raises:
        UserError: there are no names, or they do not fit.
    """
    if given is not None:
        names = [clean_name(name) for name in given.split(",")]
    elif known and not all(map(_PLACEHOLDER.fullmatch, known)):
        names = _distinct([clean_name(name) for name in known])
    else:
        raise UserError(
            f"--classes: {source} does not name its {count} outputs; give {count} names with commas between them, the "
            "background first (or --no-background)"
        )
    _check_names(names, given is not None)
    if count == 1 and len(names) == 2 and background:
        return Outputs(names, [0], None, binary=True)
    if len(names) != count:
        binary = "; a network with one output has two classes, the background and its own" if count == 1 else ""
        raise UserError(
            f"--classes: got {len(names)} names, but {source} has {count} outputs{binary}; name every output"
        )
    if not background:
        first = None
    elif given is not None:
        first = 0
    else:
        first = next((i for i, name in enumerate(names) if is_background(name)), None)
    channels = [i for i in range(count) if i != first]
    if not channels:
        raise UserError(f"--classes: expected a class beside the background {names[0]!r}; name all outputs")
    lead = "background" if first is None or is_background(names[first]) else names[first]
    return Outputs([lead, *(names[i] for i in channels)], channels, first)


def _check_names(names: Sequence[str], given: bool) -> None:
    if "" in names:
        raise UserError(f"--classes: name {names.index('') + 1} of {len(names)} is empty; name every output")
    lowered = [name.casefold() for name in names]
    if given and (twice := next((n for n in names if lowered.count(n.casefold()) > 1), None)):
        raise UserError(f"--classes: {twice!r} occurs twice; give every output a name of its own")
    if len(names) > _MOST:
        raise UserError(f"--classes: {len(names)} classes; masks have 8 bits, which hold {_MOST}")


def _distinct(names: Sequence[str]) -> list[str]:
    """Append a number to names that occurred before."""
    found: list[str] = []
    for index, name in enumerate(names):
        found.append(f"{name} {index}" if name.casefold() in map(str.casefold, found) else name)
    return found
