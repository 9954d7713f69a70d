"""The contract of a method, as checks that raise: what every registered method must do, ours and other packages'.

    from starseg.contract import check_method
    check_method("mine")

Each of :data:`CHECKS` takes a :class:`Rehearsal`, a short run of a method on random images without files. Its options
reach the method as they are; whoever needs a check of its own can walk the steps likewise.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starseg.contract.checks import CHECKS
from starseg.contract.rehearsal import SIDE, Rehearsal
from starseg.contract.runs import check_resume, check_run, tiny_settings
from starseg.data.shapes import write_shapes

__all__ = ["CHECKS", "Rehearsal", "check_method", "check_resume", "check_run", "tiny_settings"]


def check_method(name: str, **options: Any) -> None:
    """Run all checks on a registered method.

    Raises:
        AssertionError: says what the method does that it must not.
    """
    for check in CHECKS:
        check(Rehearsal(name, options=options))
    with TemporaryDirectory() as folder:
        data = write_shapes(Path(folder) / "data", train=48, val=12, size=SIDE, classes=5)
        check_run(name, data, Path(folder) / "run")
        check_resume(name, data, Path(folder))
