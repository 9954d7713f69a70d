"""Memory that processes of one machine share, found by its name.

A block of memory is a file without a path (memfd, Linux), so that the memory is freed when the last process that has it
open ends, however it ends. Other processes of the same user find it by its name among the open files in /proc.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PREFIX = "starseg-"
_BLOCK = 512  # bytes in a unit of st_blocks


class FileLock:
    """Lock of an open file, by which processes that have it open exclude each other; a process that ends frees it.

    Args:
        descriptor: of the file, open for writing.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __enter__(self) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN)


def create(name: str, size: int) -> int | None:
    """Create a block of zeros, which takes memory only as it is written to.

    Args:
        name: the name by which other processes find it.
        size: in bytes.

    Returns:
        Its file descriptor; None where the system offers no such memory (outside Linux) or does not permit it.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create(_PREFIX + name)
    except OSError:
        return None
    os.ftruncate(descriptor, size)
    return descriptor


def find(name: str, root: Path = Path("/proc")) -> int | None:
    """Open the block of this name that this or another process of the same user has open.

    Returns:
        A new file descriptor; None if there is no such block.
    """
    for path, found in _blocks(root):
        with suppress(OSError):  # its process may have ended, or may not let others look into it
            status = path.stat()
            # A block has no size yet while it is created. Root would also find blocks of other users.
            if found == name and status.st_size and status.st_uid == os.getuid():
                return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    return None


def unwritten_bytes(root: Path = Path("/proc")) -> int:
    """Return how much memory all blocks of this user's processes may still take: their sizes less what is written."""
    rest = {}
    for path, _ in _blocks(root):
        with suppress(OSError):
            status = path.stat()
            rest[status.st_dev, status.st_ino] = max(0, status.st_size - _BLOCK * status.st_blocks)
    return sum(rest.values())


def _blocks(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the open files of processes that are blocks, with their names; a block occurs once per open file."""
    start = f"/memfd:{_PREFIX}"
    for path in root.glob("[0-9]*/fd/*"):
        with suppress(OSError):
            target = os.readlink(path)
            if target.startswith(start):
                yield path, target.removeprefix(start).removesuffix(" (deleted)")
