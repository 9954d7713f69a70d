"""Label maps, which turn the ids found in mask files (ids on disk) into class ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np

from starseg.tasks import IGNORE


@dataclass(frozen=True)
class LabelMap:
    """Mapping from ids on disk to class ids.

    Attributes:
        classes: class id by id on disk.
        ignored: ids on disk whose pixels are ignored. Ids that are in neither are unknown and rejected before training.
    """

    classes: Mapping[int, int]
    ignored: frozenset[int] = frozenset({IGNORE})

    @classmethod
    def make(cls, names: int, classes: Mapping[int, int] | None = None, ignored: Collection[int] = ()) -> LabelMap:
        """Create the label map of a data set.

        Args:
            names: number of class names, with the background.
            classes: class ids by id on disk; None if ids on disk are class ids.
            ignored: ids on disk whose pixels are ignored, in addition to 255.
        """
        if classes is None:
            classes = {i: i for i in range(names) if i != IGNORE and i not in ignored}
        return cls(classes, frozenset({IGNORE, *ignored}))

    @cached_property
    def _class_ids(self) -> dict[int, int]:
        """Class id, or 255 for ignored ids, by known id on disk."""
        return {**self.classes, **dict.fromkeys(self.ignored, IGNORE)}

    @cached_property
    def _identity(self) -> bool:
        return all(value == class_id for value, class_id in self._class_ids.items())

    def compose(self, table: np.ndarray) -> np.ndarray:
        """Turn a lookup table by class id into one by id on disk.

        Args:
            table: [256] uint8 by class id, such as :meth:`starseg.tasks.TaskSequence.relabelling`.

        Returns:
            [256] uint8 by id on disk, with unknown ids ignored; ``table`` itself if ids on disk are class ids.
        """
        if self._identity:
            return table
        lookup = np.full(256, IGNORE)
        lookup[list(self._class_ids)] = list(self._class_ids.values())
        return table[lookup]

    def class_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Convert pixel counts by id on disk to counts by class id.

        Args:
            pixels: [..., 256] integers by id on disk.

        Returns:
            [..., 256] by class id, without unknown ids; ``pixels`` itself if ids on disk are class ids.
        """
        if self._identity:
            return pixels
        counted = np.zeros_like(pixels)
        for value, class_id in self._class_ids.items():
            counted[..., class_id] += pixels[..., value]
        return counted

    def unknown(self, pixels: np.ndarray) -> np.ndarray:
        """Find ids on disk that occur in pixel counts [..., 256] but are neither a class nor ignored.

        Returns:
            [..., 256] bool.
        """
        known = np.zeros(256, bool)
        known[list(self._class_ids)] = True
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
