"""Runs starseg commands in forks of one process, which has torch imported, and kills them (SIGKILL) at the n-th call of
a function.

As a program it reads a request a line, {"argv": [...], "kill": [moment, n] or null, "log": path}, and answers with the
pid of the fork, then with its exit code (negative for a signal).
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

MOMENTS = {
    "scan before": ("starseg.methods.prototype_replay", "count_cells"),
    "iteration": ("starseg.engine.fit", "StepTraining.iterate"),
    "scan after": ("starseg.replay.statistics", "FeatureStatistics.update"),
    "write": ("os", "fsync"),
    "rename": ("pathlib", "Path.replace"),
    "publish": ("starseg.engine.checkpoint", "save"),
    "test": ("starseg.engine.evaluate", "predict_upsampled"),
}


def _arm(moment: str, count: int) -> None:
    module, path = MOMENTS[moment]
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            print(f"killed at {moment}, call {count}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)


def _run(request: dict[str, Any]) -> int:
    from starseg.cli.main import main as starseg

    signal.alarm(300)
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{request['log']}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if request["kill"]:
        _arm(*request["kill"])
    sys.argv = ["starseg", *request["argv"]]
    try:
        starseg()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    for module in ("starseg.cli.main", "starseg.engine.runner", "starseg.report.page"):
        importlib.import_module(module)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            code = _run(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Starter:
    """Starts commands as :func:`main` does, one at a time; logs lie in ``folder``."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.log = folder / "log"
        environment = {**os.environ, "STARSEG_CACHE": str(cache)}
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *argv: str, kill: tuple[str, int] | None = None) -> int:
        """Start a command; its pid."""
        assert self.server.stdin and self.server.stdout
        print(json.dumps({"argv": argv, "kill": kill, "log": str(self.log)}), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def wait(self) -> subprocess.CompletedProcess:
        assert self.server.stdout
        code = int(self.server.stdout.readline())
        texts = (self.log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return subprocess.CompletedProcess([], code, *texts)

    def run(self, *argv: str, kill: tuple[str, int] | None = None) -> subprocess.CompletedProcess:
        self.start(*argv, kill=kill)
        return self.wait()

    def close(self) -> None:
        self.server.communicate()


if __name__ == "__main__":
    main()
