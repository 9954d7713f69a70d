"""Fixtures of the tests of adoption."""

from collections.abc import Callable
from pathlib import Path

import pytest

from adoption.originals import LIBRARIES, Original


@pytest.fixture
def original(tmp_path: Path) -> Callable[[str], Original]:
    """Return a function that makes the network ``library:name``."""

    def make(text: str) -> Original:
        library, _, name = text.partition(":")
        folder = tmp_path / "original"
        folder.mkdir()
        return LIBRARIES[library](name, folder)

    return make
