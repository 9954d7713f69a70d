"""Fixtures of the end-to-end tests."""

from collections.abc import Iterator

import pytest

from e2e.kill_at import Starter


@pytest.fixture(scope="session")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Runs starseg commands in processes of their own that need no time to import torch."""
    started = Starter(tmp_path_factory.mktemp("logs"), tmp_path_factory.getbasetemp() / "cache")
    yield started
    started.close()
