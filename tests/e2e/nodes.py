"""Nodes of a cluster on one machine: network namespaces of Linux, each with an address and a host name of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEVICE = "eth0"


class NotPermitted(Exception):
    """This machine does not let the user create network namespaces."""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise NotPermitted(done.stderr.strip())


@contextmanager
def two_nodes() -> Iterator[list[tuple[str, str]]]:
    """Create two namespaces that are connected by a cable and by nothing else.

    Yields:
        The name and the IP address of each.

    Raises:
        NotPermitted: the program `ip` is missing, or the user is not root.
    """
    if not shutil.which("ip"):
        raise NotPermitted("the program ip (iproute2) is not installed")
    tag = f"ss{os.getpid()}"
    nodes = [(f"{tag}n{rank}", f"10.213.0.{rank + 1}") for rank in range(2)]
    try:
        for name, _ in nodes:
            _ip("netns", "add", name)
        ends = [("netns", name) for name, _ in nodes]
        _ip("link", "add", DEVICE, *ends[0], "type", "veth", "peer", "name", DEVICE, *ends[1])
        for name, address in nodes:
            _ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _ip("-n", name, "link", "set", device, "up")
        yield nodes
    finally:
        for name, _ in nodes:
            if (Path("/run/netns") / name).exists():
                subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30)
