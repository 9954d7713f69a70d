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
from starseg.methods import METHODS, StepContext
from starseg.methods.constellation import Constellation


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_iteration_does_not_wait_for_the_gpu(
    name: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except the first of a stage, which counts what is replayed."""
    iterate, plan = StepTraining.iterate, Constellation._plan
    waits, checked = Waits(), set()

    def watched(training: StepTraining, raw: Any) -> dict[str, Tensor]:
        if not training.iteration:
            return iterate(training, raw)
        checked.add(training.ctx.step)
        with waits:
            return iterate(training, raw)

    def planned(method: Constellation, ctx: StepContext) -> None:
        """Fix the size of draws, as on a GPU."""
        plan(method, ctx)
        if method.bank:
            method.draw_size = method.options.draws + len(method.bank.owners)

    monkeypatch.setattr(StepTraining, "iterate", watched)
    monkeypatch.setattr(Constellation, "_plan", planned)
    settings = tiny_settings(name, shapes, tmp_path / "run")
    del settings["task"]["steps"][2:]
    train(parse_config(settings), console=Console(quiet=True))
    assert checked == ({0} if name in ("joint", "segacil") else {0, 1}) and waits.found == []
