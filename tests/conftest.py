"""Shared fixtures. Tests never touch the user's cache."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("STARSEG_SHARED") or Path(__file__).parents[2] / "shared")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("STARSEG_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def voc_subset() -> Path:
    """The real VOC subset."""
    root = SHARED / "data" / "PascalVOC2012"
    if not root.is_dir():
        pytest.skip(f"needs the real VOC subset at {root}; set STARSEG_SHARED to the folder that holds data/")
    return root
