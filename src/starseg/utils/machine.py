"""CPU cores and memory that are available to this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    known = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(known(0)) if known else os.cpu_count() or 1


def free_shared_memory(root: Path = Path("/dev/shm")) -> int:
    """Return the free bytes of /dev/shm, of which a container gets 64 MB by default."""
    return shutil.disk_usage(root).free if root.is_dir() else available_memory()


def available_memory(root: Path = Path("/")) -> int:
    """Return the available memory in bytes, limited by control groups; outside Linux, the total memory."""
    try:
        rows = (row.split() for row in (root / "proc/meminfo").read_text().splitlines())
        free = next(1024 * int(row[1]) for row in rows if row[0] == "MemAvailable:")
        return max(0, min([free, *_left_by_groups(root)]))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left of the limit of each control group of this process; page cache counts as free."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, cached = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = root / top / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError, KeyError):  # not a group, or one without a limit ("max")
                free = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(free[cached])
                yield int((folder / limit).read_text()) - used
