"""Training runs at every precision on any CPU, and `auto` chooses the one that the CPU is fast at."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from starseg.config import TrainConfig, parse_config
from starseg.engine.checkpoint import load_bank, load_model
from starseg.engine.evaluate import evaluate_model
from starseg.engine.launch import make_fabric
from starseg.engine.runner import train

QUIET = Console(quiet=True)


@pytest.mark.parametrize(("precision", "used"), [("32", "32-true"), ("bf16-mixed", "bf16-mixed")])
def test_star_trains_and_is_evaluated(tiny: dict, precision: str, used: str) -> None:
    config = parse_config({**tiny, "train": {**tiny["train"], "precision": precision}})
    run = train(config, console=QUIET)
    results = json.loads((run / "results.json").read_text())
    assert results["run"]["precision"] == used and len(results["steps"]) == 3
    for entry in results["steps"]:
        step = Path(run) / f"step_{entry['step']}"
        model, info = load_model(step)
        tensors = [*model.state_dict().values(), *load_bank(step).values()]
        assert all(t.isfinite().all() and t.dtype in (torch.float32, torch.float64, torch.int64) for t in tensors)
        assert evaluate_model(model, info, config, QUIET)["iou"] == entry["iou"]


@pytest.mark.parametrize(
    ("capabilities", "used"),
    [({}, "32-true"), ({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed")],
)
def test_auto_is_bf16_on_cpus_that_are_fast_at_it(
    capabilities: dict[str, bool], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert make_fabric(TrainConfig(accelerator="cpu"))._precision.precision == used
