"""Train methods one after another in two processes that are started once: two_processes.py DATA OUT NAMES..."""

import sys
from pathlib import Path

from starseg.config import parse_config
from starseg.contract import tiny_settings
from starseg.engine.runner import train


def main() -> None:
    data, out, *names = sys.argv[1:]
    for name in names:
        settings = tiny_settings(name, Path(data), Path(out) / name)
        settings["train"]["devices"] = 2
        train(parse_config(settings), range(1 if name == "joint" else 2))


if __name__ == "__main__":
    main()
