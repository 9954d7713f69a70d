"""Runs commands of starseg in this process."""

import sys

import pytest

from starseg.cli.main import main


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Run ``starseg ARGS`` and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["starseg", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)
