"""Checks of a method in runs of the real engine on a tiny data set; a check that fails raises AssertionError."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from starseg.config import RunConfig, parse_config
from starseg.contract.harness import BACKBONE, SIDE, MethodHarness
from starseg.data.samples import Batch
from starseg.engine.checkpoint import load_model
from starseg.engine.evaluate import evaluate_model
from starseg.engine.fit import StepTraining
from starseg.engine.runner import Runner
from starseg.engine.state import begun
from starseg.errors import Stopped
from starseg.methods import METHODS
from starseg.utils.files import read_json
from starseg.utils.terminal import make_console

_QUIET = make_console(quiet=True)


def tiny_settings(name: str, data: Path, out: Path, **train: Any) -> dict[str, Any]:
    """Return the configuration of a three-step run that takes seconds, on the data of :func:`write_shapes`.

    Args:
        name: name of a registered method.
        data: folder of the data.
        out: run directory.
        train: changes of the section `train`.
    """
    method = METHODS[name]
    options = {method.section: dict(method.contract_options)} if method.contract_options else {}
    return options | {
        "method": name,
        "out": str(out),
        "data": {"root": str(data), "crop": SIDE},
        "task": {"name": "tiny", "steps": [["heart", "disc", "triangle"], ["hexagon"], ["square"]]},
        "model": {"backbone": BACKBONE, "pretrained": False},
        "train": {
            "batch_size": 4,
            "base": {"epochs": 1, "lr": 0.01},
            "later": {"epochs": 1, "lr": 0.001},
            "precision": "32",
            **train,
        },
    }


def _train(config: RunConfig, steps: range | None = None) -> Path:
    with Runner(config, _QUIET, steps) as runner:
        return runner.run()


def check_run(name: str, data: Path, out: Path) -> None:
    """Check that three steps run, and that each step directory alone is enough to evaluate its model."""
    config = parse_config(tiny_settings(name, data, out))
    results = read_json(_train(config) / "results.json")
    assert list(results["steps"][-1]["iou"]) == ["background", "heart", "disc", "triangle", "hexagon", "square"]
    for entry in results["steps"]:
        again = evaluate_model(*load_model(out / f"step_{entry['step']}"), config, _QUIET)
        assert again["iou"] == entry["iou"], f"step {entry['step']}: evaluated again, its directory gives other figures"


def _last_trained_step(name: str) -> int:
    """Return 1 if the method trains in a later step, else 0."""
    run = MethodHarness(name)
    if len(run.task) == 1:
        return 0
    run.walk(1)
    return 1 if run.enter(1)[2] else 0


def check_resume(name: str, data: Path, folder: Path, **train: Any) -> None:
    """Check that a step, interrupted and resumed, ends with the same files, byte for byte.

    It is a later step, unless the method trains in step 0 only.

    Args:
        name: name of a registered method.
        data: folder of the data, see :func:`write_shapes`.
        folder: folder for the runs.
        train: changes of the section `train`; on a GPU, `deterministic=True` is needed.
    """
    settings = tiny_settings(name, data, folder / "straight", **train)
    last = _last_trained_step(name)
    straight = _train(parse_config(settings), range(last + 1))
    settings |= {"out": str(folder / "broken"), **({"start_from": str(straight / "step_0")} if last else {})}
    settings["train"]["save_minutes"] = 1e-9  # saves after every iteration
    broken = parse_config(settings)
    with _breaking_off(step=last, iteration=2), suppress(Stopped):
        _train(broken, range(last + 1))
    assert begun(broken.run_dir / f"step_{last}"), f"step {last} was to break off, and left no state"
    _train(broken, range(last + 1))
    for path in sorted((straight / f"step_{last}").glob("*.safetensors")):
        again = broken.run_dir / path.relative_to(straight)
        assert again.read_bytes() == path.read_bytes(), f"{path.name} of step {last}: another one after a break"


@contextmanager
def _breaking_off(step: int, iteration: int) -> Iterator[None]:
    """Stop training in a step before an iteration, as a signal stops it."""
    iterate = StepTraining.iterate

    def until(training: StepTraining, raw: Batch) -> dict[str, Tensor]:
        if training.ctx.step == step and training.iteration == iteration:
            raise Stopped(signal.SIGTERM)
        return iterate(training, raw)

    with patch.object(StepTraining, "iterate", until):
        yield
