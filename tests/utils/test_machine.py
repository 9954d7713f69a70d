"""CPU cores and memory available to a process."""

from pathlib import Path

import pytest

from starseg.utils.machine import available_memory, free_shared_memory

_V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("groups", "files", "want"),
    [
        ("0::/\n", {}, 1000 * 1024),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory": (5000, 3000, 500)}, 2500),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory": ("max", 1, 0), "sys/fs/cgroup/memory": (9000, 8000, 0)}, 1000),
        ("0::/a\n", {"sys/fs/cgroup/a/memory": (100, 200, 0)}, 0),
        ("4:cpu,memory:/x\n0::/\n", {f"{_V1}/memory": (7000, 5000, 1000), f"{_V1}/x/memory": (2**63, 1, 0)}, 3000),
    ],
)
def test_available_memory_is_limited_by_the_machine_and_control_groups(
    groups: str, files: dict[str, tuple[int | str, int, int]], want: int, tmp_path: Path
) -> None:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:  1000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
    for stem, (limit, usage, cached) in files.items():
        first = "memory" in groups
        path = tmp_path / stem
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name("memory.limit_in_bytes" if first else "memory.max").write_text(f"{limit}\n")
        path.with_name("memory.usage_in_bytes" if first else "memory.current").write_text(f"{usage}\n")
        path.with_name("memory.stat").write_text(f"rss 5\n{'total_' * first}inactive_file {cached}\n")
    assert available_memory(tmp_path) == want


def test_memory_of_this_machine_and_of_one_without_proc(tmp_path: Path) -> None:
    assert 0 < available_memory() <= available_memory(tmp_path)


def test_without_dev_shm_the_available_memory_is_returned(tmp_path: Path) -> None:
    assert free_shared_memory(tmp_path) > 0 and free_shared_memory(tmp_path / "none") > 0
