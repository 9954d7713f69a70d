"""Contract of a method: checks that every registered method passes, including those of other packages.

    from starseg.contract import check_method
    check_method("mine")

Each of :data:`CHECKS` takes a :class:`MethodHarness`, which takes a method through a few steps on random images.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from starseg.contract.checks import CHECKS
from starseg.contract.harness import SIDE, MethodHarness
from starseg.contract.runs import check_resume, check_run, tiny_settings
from starseg.data.shapes import write_shapes
from starseg.utils.deprecation import old_names

__getattr__ = old_names(__name__)

__all__ = ["CHECKS", "MethodHarness", "check_method", "check_resume", "check_run", "tiny_settings"]


def check_method(name: str, **options: Any) -> None:
    """Run all checks on a registered method.

    Raises:
        AssertionError: says what the method does that it must not.
    """
    for check in CHECKS:
        check(MethodHarness(name, options=options))
    with TemporaryDirectory() as folder:
        data = write_shapes(Path(folder) / "data", train=48, val=12, size=SIDE, classes=5)
        check_run(name, data, Path(folder) / "run")
        check_resume(name, data, Path(folder))
