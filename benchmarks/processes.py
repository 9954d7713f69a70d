"""Measure training on a CPU by the number of processes, threads and OpenMP's settings (docs/performance.md).

Usage: python benchmarks/processes.py [ITERATIONS [REPEATS]]. Every row trains an EfficientNet-Lite0 on random images, 8
of 192 pixels per iteration: one run in one process, one run in two processes that average their gradients (gloo), or
two runs at once. Wall-clock seconds depend on what else the machine does; CPU seconds show what is lost in waiting.
"""

import os
import resource
import socket
import statistics
import subprocess
import sys
import time

BATCH, SIDE = 8, 192
KINDS = ("one run, 1 process", "one run, 2 processes", "two runs")
SETTINGS: tuple[tuple[str, int, dict[str, str]], ...] = (
    (KINDS[0], 1, {}),
    (KINDS[0], 2, {}),
    (KINDS[0], 2, {"OMP_WAIT_POLICY": "PASSIVE"}),
    (KINDS[0], 2, {"OMP_WAIT_POLICY": "ACTIVE"}),
    (KINDS[0], 2, {"OMP_PROC_BIND": "true"}),
    (KINDS[1], 1, {}),
    (KINDS[1], 1, {"OMP_WAIT_POLICY": "PASSIVE"}),
    (KINDS[2], 1, {}),
    (KINDS[2], 1, {"OMP_WAIT_POLICY": "PASSIVE"}),
    (KINDS[2], 2, {}),
    (KINDS[2], 2, {"OMP_WAIT_POLICY": "PASSIVE"}),
    (KINDS[2], 2, {"OMP_WAIT_POLICY": "ACTIVE"}),
)


def work(iterations: int, rank: int, world: int, port: int) -> None:
    """Train and print the wall-clock and CPU seconds of this process."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from starseg.models import Architecture, make_network

    torch.manual_seed(0)
    network = make_network(Architecture("tf_efficientnet_lite0"), [4]).train()
    model: torch.nn.Module = network
    if world > 1:
        torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), 1e-4)
    images = torch.randn(BATCH // world, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        model(images).logits.square().mean().backward()
        optimizer.step()

    step()
    print("ready", flush=True)
    sys.stdin.readline()  # all processes of a row start together
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(iterations):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(time.perf_counter() - start, cpu, flush=True)


def measure(kind: str, threads: int, settings: dict[str, str], iterations: int) -> tuple[float, float]:
    """Return the wall-clock and CPU seconds of ``iterations`` iterations of each run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    environment = {**others, "OMP_NUM_THREADS": str(threads), **settings}
    count, world = (1 if kind == KINDS[0] else 2), (2 if kind == KINDS[1] else 1)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "work", *map(str, (iterations, rank, world, port))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    results = [tuple(map(float, process.communicate()[0].split())) for process in processes]
    return max(wall for wall, _ in results), sum(cpu for _, cpu in results)


def main(iterations: int = 8, repeats: int = 3) -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; medians of {repeats}")
    print("| | threads per process | settings | images/s | CPU seconds per image |")
    print("|---|---|---|---|---|", flush=True)
    for kind, threads, settings in SETTINGS:
        images = BATCH * iterations * (2 if kind == KINDS[2] else 1)
        measured = zip(*(measure(kind, threads, settings, iterations) for _ in range(repeats)), strict=True)
        wall, cpu = map(statistics.median, measured)
        text = ", ".join(f"`{name}={value}`" for name, value in settings.items()) or "-"
        print(f"| {kind} | {threads} | {text} | {images / wall:.1f} | {cpu / images:.3f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
