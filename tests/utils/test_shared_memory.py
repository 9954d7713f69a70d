"""Memory shared by processes that know its name."""

import os
import sys

import pytest

from starseg.utils import shared_memory

NAME, SIZE = f"test-{os.getpid()}", 2**20


@pytest.fixture(autouse=True)
def _own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_PREFIX", f"starseg-test-{os.getpid()}-")


def _block(name: str, size: int) -> int:
    created = shared_memory.create(name, size)
    assert created is not None
    return created


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")
def test_a_block_is_found_by_its_name_until_it_is_closed() -> None:
    assert shared_memory.find(NAME) is None
    block = _block(NAME, SIZE)
    assert shared_memory.find("other") is None
    found = shared_memory.find(NAME)
    assert found is not None
    os.pwrite(block, b"abc", SIZE - 3)
    assert os.pread(found, 3, SIZE - 3) == b"abc"
    os.close(block)
    os.close(found)
    assert shared_memory.find(NAME) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")
def test_a_block_of_another_user_or_without_a_size_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [_block("empty", 0), _block(NAME, SIZE)]
    assert shared_memory.find("empty") is None
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert shared_memory.find(NAME) is None
    for block in blocks:
        os.close(block)


@pytest.mark.skipif(sys.platform != "linux", reason="needs memfd")
def test_what_is_not_written_yet_is_counted_once_per_block() -> None:
    blocks = [_block(NAME, SIZE), _block("other", SIZE)]
    blocks.append(os.dup(blocks[0]))
    assert shared_memory.unwritten_bytes() == 2 * SIZE
    os.pwrite(blocks[0], bytes(SIZE // 2), 0)
    assert shared_memory.unwritten_bytes() == 3 * SIZE // 2
    for block in blocks:
        os.close(block)


def test_without_memfd_there_is_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "memfd_create", lambda name: os.close(-1), raising=False)  # an OSError, as if forbidden
    assert shared_memory.create(NAME, SIZE) is None
    monkeypatch.delattr(os, "memfd_create")
    assert shared_memory.create(NAME, SIZE) is None
