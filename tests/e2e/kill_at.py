"""Run starseg and kill it (SIGKILL) at the n-th call of a function: kill_at.py MOMENT N ARGS..."""

import importlib
import os
import signal
import sys
from typing import Any

MOMENTS = {
    "scan": ("starseg.methods.star", "on_grid"),
    "iteration": ("starseg.engine.fit", "StepTraining.iterate"),
    "write": ("os", "fsync"),
    "rename": ("pathlib", "Path.replace"),
    "publish": ("starseg.engine.checkpoint", "save"),
    "test": ("starseg.engine.evaluate", "multiclass_confusion_matrix"),
}


def main() -> None:
    moment, count = sys.argv[1], int(sys.argv[2])
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
            print(f"killed at {moment} {count}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)
    from starseg.cli import main as starseg

    sys.argv = ["starseg", *sys.argv[3:]]
    starseg()


if __name__ == "__main__":
    main()
