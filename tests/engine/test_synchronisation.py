"""No iteration waits for the GPU, detected on a CPU; tests/e2e/test_gpu.py checks the same on a GPU."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import Tensor

from engine.waits import Waits
from starseg.config import parse_config
from starseg.contract import tiny_settings
from starseg.engine.fit import StepTraining
from starseg.experiments.train import train
from starseg.replay.gaussians import GaussianBank


@pytest.mark.parametrize("name", ["star", "constellation"])
def test_an_iteration_does_not_wait_for_the_gpu(
    name: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except the first of a stage, which counts what is replayed, and constellation's draw, whose size is random."""
    iterate, draw = StepTraining.iterate, GaussianBank.draw
    waits, checked = Waits(), set()

    def watched(training: StepTraining, raw: Any) -> dict[str, Tensor]:
        if not training.iteration:
            return iterate(training, raw)
        checked.add(training.ctx.step)
        with waits:
            return iterate(training, raw)

    def exempt(*args: Any) -> tuple[Tensor, Tensor]:
        known = len(waits.found)
        drawn = draw(*args)
        del waits.found[known:]
        return drawn

    monkeypatch.setattr(StepTraining, "iterate", watched)
    monkeypatch.setattr(GaussianBank, "draw", exempt)
    train(parse_config(tiny_settings(name, shapes, tmp_path / "run")), range(2), Console(quiet=True))
    assert checked == {0, 1} and waits.found == []
