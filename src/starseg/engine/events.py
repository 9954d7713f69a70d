"""Events of a run, to which listeners can be attached that print or record them.

The engine does not depend on its listeners. Events are emitted only by the process that writes the run's files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepFinished:
    """A step has been trained, evaluated and published.

    Attributes:
        step: number of the step.
        folder: directory of the step.
        results: content of results.json, including this step.
    """

    step: int
    folder: Path
    results: Mapping[str, Any]


Listener = Callable[[StepFinished], None]
