"""Label maps: class ids of the values found in mask files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from starseg.tasks import IGNORE


@dataclass(frozen=True)
class LabelMap:
    """Class ids by id on disk.

    Attributes:
        classes: class id of every id on disk that shows a class.
        ignored: ids on disk whose pixels are ignored; all others are unknown, and refused before training.
    """

    classes: Mapping[int, int]
    ignored: frozenset[int] = frozenset({IGNORE})

    @classmethod
    def make(cls, names: int, classes: Mapping[int, int] | None = None, ignored: Collection[int] = ()) -> LabelMap:
        """The label map of a data set.

        Args:
            names: how many classes have a name.
            classes: class ids by id on disk; None for the ids themselves.
            ignored: ids on disk whose pixels are ignored, besides 255.
        """
        if classes is None:
            classes = {i: i for i in range(names) if i != IGNORE and i not in ignored}
        return cls(classes, frozenset({IGNORE, *ignored}))

    @cached_property
    def _class_ids(self) -> dict[int, int]:
        """Class id, or 255, of every known id on disk."""
        return {**self.classes, **dict.fromkeys(self.ignored, IGNORE)}

    @cached_property
    def _identity(self) -> bool:
        return all(value == class_id for value, class_id in self._class_ids.items())

    def compose(self, table: np.ndarray) -> np.ndarray:
        """Make a table by class id one by id on disk.

        Args:
            table: [256] uint8 by class id, such as :meth:`starseg.tasks.TaskSequence.relabelling`.

        Returns:
            [256] uint8 by id on disk, unknown ids ignored; ``table`` itself where ids on disk are class ids.
        """
        if self._identity:
            return table
        lookup = np.full(256, IGNORE)
        lookup[list(self._class_ids)] = list(self._class_ids.values())
        return table[lookup]

    def class_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels of every class id from pixels of every id on disk.

        Args:
            pixels: [..., 256] integers by id on disk.

        Returns:
            [..., 256] by class id, without the unknown ids; ``pixels`` itself where ids on disk are class ids.
        """
        if self._identity:
            return pixels
        counted = np.zeros_like(pixels)
        for value, class_id in self._class_ids.items():
            counted[..., class_id] += pixels[..., value]
        return counted

    def unknown(self, pixels: np.ndarray) -> np.ndarray:
        """Which ids on disk occur, [..., 256] pixels, but are neither a class nor ignored: [..., 256] bool."""
        known = np.zeros(256, bool)
        known[list(self._class_ids)] = True
        return (pixels > 0) & ~known

    def __str__(self) -> str:
        """The ids on disk that may occur, for messages: "0 to 20, 255 ignored"."""
        separator = ", " if self.ignored == {IGNORE} else "; "
        return f"{_ranges(self.classes)}{separator}{_ranges(self.ignored)} ignored"


def _ranges(ids: Iterable[int]) -> str:
    """Ids as text, consecutive ones as "first to last"."""
    runs = (list(run) for _, run in groupby(enumerate(sorted(ids)), lambda pair: pair[1] - pair[0]))
    return ", ".join(f"{run[0][1]} to {run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
