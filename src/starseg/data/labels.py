"""Label maps, which turn the ids found in mask files (ids on disk) into class ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from starseg.tasks import IGNORE, WIDE_IGNORE


@dataclass(frozen=True)
class LabelMap:
    """Mapping from ids on disk to class ids.

    Attributes:
        classes: class id by id on disk.
        ignored: ids on disk whose pixels are ignored. Ids that are in neither are unknown and rejected before training.

    With more than 254 classes the map is *wide*: masks have 16 bits, and ignored pixels the id 65535 instead of 255.
    """

    classes: Mapping[int, int]
    ignored: frozenset[int] = frozenset({IGNORE})

    @classmethod
    def make(cls, names: int, classes: Mapping[int, int] | None = None, ignored: Collection[int] = ()) -> LabelMap:
        """Create the label map of a data set.

        Args:
            names: number of class names, with the background.
            classes: class ids by id on disk; None if ids on disk are class ids.
            ignored: ids on disk whose pixels are ignored, in addition to 255 (65535 with more than 254 classes).
        """
        skipped = {WIDE_IGNORE if names > IGNORE else IGNORE, *ignored}
        if classes is None:
            classes = {i: i for i in range(names) if i not in skipped}
        return cls(classes, frozenset(skipped))

    @cached_property
    def wide(self) -> bool:
        """Whether masks have 16 bits and labels more than 8."""
        return max(self.classes, default=0) > IGNORE or max(self.classes.values(), default=0) >= IGNORE

    @property
    def ignored_id(self) -> int:
        """Class id of ignored pixels: 255, or 65535 if wide."""
        return WIDE_IGNORE if self.wide else IGNORE

    @property
    def columns(self) -> int:
        """Number of columns of pixel counts by id: 256; if wide, of which ignored pixels have none, for all known ids.

        The last column of a wide map counts all other ids.
        """
        return max(IGNORE, *self.classes, *self.classes.values()) + 2 if self.wide else IGNORE + 1

    @cached_property
    def _class_ids(self) -> dict[int, int]:
        """Class id, or :attr:`ignored_id`, by known id on disk."""
        return {**self.classes, **dict.fromkeys(self.ignored, self.ignored_id)}

    @cached_property
    def _identity(self) -> bool:
        return all(value == class_id for value, class_id in self._class_ids.items())

    def compose(self, table: np.ndarray) -> np.ndarray:
        """Turn a lookup table by class id into one by id on disk.

        Args:
            table: [256] uint8 by class id, such as :meth:`starseg.tasks.TaskSequence.relabelling`; [65536] if wide.

        Returns:
            The table by id on disk, with unknown ids ignored; ``table`` itself if ids on disk are class ids.
        """
        if self._identity:
            return table
        lookup = np.full(self.ignored_id + 1, self.ignored_id)
        lookup[list(self._class_ids)] = list(self._class_ids.values())
        return table[lookup]

    def class_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Convert pixel counts by id on disk to counts by class id.

        Args:
            pixels: [..., :attr:`columns`] integers by id on disk.

        Returns:
            The counts by class id, without unknown ids; ``pixels`` itself if ids on disk are class ids.
        """
        if self._identity:
            return pixels
        counted = np.zeros_like(pixels)
        for value, class_id in (self.classes if self.wide else self._class_ids).items():
            counted[..., class_id] += pixels[..., value]
        return counted

    def unknown(self, pixels: np.ndarray) -> np.ndarray:
        """Find ids on disk that occur in pixel counts [..., :attr:`columns`] but are neither a class nor ignored.

        Returns:
            Bool, of the shape of ``pixels``.
        """
        known = np.zeros(self.columns, bool)
        known[[i for i in self._class_ids if i < self.columns]] = True
        return (pixels > 0) & ~known

    def __str__(self) -> str:
        """Return the known ids on disk as text, such as "0 to 20, 255 ignored"."""
        if not self.ignored:
            return _ranges(self.classes)
        separator = ", " if self.ignored == {IGNORE} else "; "
        return f"{_ranges(self.classes)}{separator}{_ranges(self.ignored)} ignored"


def _ranges(ids: Iterable[int]) -> str:
    """Format ids as text, with consecutive ones as "first to last"."""
    runs = (list(run) for _, run in groupby(enumerate(sorted(ids)), lambda pair: pair[1] - pair[0]))
    return ", ".join(f"{run[0][1]} to {run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs)
