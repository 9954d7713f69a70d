"""A run on a GPU equals one on a CPU up to rounding, and is repeatable on request."""

from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from starseg.config import parse_config
from starseg.engine.checkpoint import load_bank, load_model
from starseg.engine.runner import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
_QUIET = Console(quiet=True)


def _run(settings: dict, out: Path, **train_section: object) -> Path:
    changed = {**settings, "out": str(out), "train": {**settings["train"], **train_section}}
    return train(parse_config(changed), range(2), _QUIET)


def _first_losses(run: Path) -> dict[str, float]:
    events = EventAccumulator(str(run / "step_1" / "logs")).Reload()
    return {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"] if tag.startswith("loss/")}


def test_losses_of_a_later_step_are_those_of_a_cpu(tiny: dict, tmp_path: Path) -> None:
    cpu = _run(tiny, tmp_path / "cpu", accelerator="cpu", precision="32")
    shared = {**tiny, "start_from": str(cpu / "step_0")}
    gpu = _run(shared, tmp_path / "gpu", accelerator="gpu", precision="32")
    half = _run(shared, tmp_path / "half", accelerator="gpu", precision="bf16-mixed")
    want = _first_losses(cpu)
    assert _first_losses(gpu) == pytest.approx(want, rel=1e-2, abs=1e-4)
    assert _first_losses(half) == pytest.approx(want, rel=1e-1, abs=1e-2)
    assert torch.equal(load_bank(gpu / "step_1")["counts"][:4], load_bank(cpu / "step_1")["counts"][:4])


def test_deterministic_runs_are_equal(tiny: dict, tmp_path: Path) -> None:
    runs = [_run(tiny, tmp_path / name, accelerator="gpu", deterministic=True) for name in ("a", "b")]
    one, two = (load_model(run / "step_1")[0].state_dict() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
