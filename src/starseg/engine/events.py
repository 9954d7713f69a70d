"""Events of a run, for whoever wants to print or record them.

The engine emits them and knows nothing of its listeners. Only the process that writes the run's files emits events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepFinished:
    """A step was trained, evaluated and published.

    Attributes:
        step: its number.
        folder: its directory.
        results: content of results.json, this step included.
    """

    step: int
    folder: Path
    results: Mapping[str, Any]


Listener = Callable[[StepFinished], None]
