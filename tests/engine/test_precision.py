"""Training runs at every precision on any CPU, and `auto` chooses the one that the CPU is fast at."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from starseg.config import TrainConfig, parse_config
from starseg.engine.checkpoint import load_bank, load_model
from starseg.engine.evaluate import evaluate_model, open_weights
from starseg.engine.features import features_autocast
from starseg.engine.launch import make_fabric
from starseg.engine.runner import train
from starseg.errors import UserError
from starseg.inference.predictor import load
from starseg.models import Architecture, Segmenter, make_network
from starseg.report.testset import open_test_set
from starseg.utils.precision import Precision

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


@pytest.mark.parametrize(("precision", "bf16"), [("auto", False), ("32", False), ("bf16", True)])
def test_evaluation_and_reports_are_in_float32_unless_asked_otherwise(
    precision: str, bf16: bool, tiny: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    asked, predict = set(), Segmenter.predict

    def record(model: Segmenter, images: torch.Tensor, bf16: bool = False) -> torch.Tensor:
        asked.add(bf16)
        return predict(model, images, bf16)

    monkeypatch.setattr(Segmenter, "predict", record)
    config = parse_config({**tiny, "eval": {"precision": precision}})
    step = train(config, [0], QUIET) / "step_0"
    assert asked == {bf16}, "after the step"
    asked.clear()
    figures = evaluate_model(*open_weights(step, []), QUIET)
    assert asked == {bf16} and figures["iou"] == json.loads((step / "metrics.json").read_text())["iou"]
    asked.clear()
    test = open_test_set(step.parent)
    test.predict(step, test.samples(test.positions[:2])[0])
    assert asked == {bf16}, "in a report"


def test_logits_in_bf16_are_those_in_float32_up_to_rounding() -> None:
    model = make_network(Architecture("test_resnet"), [3]).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        single, half = model.predict(images), model.predict(images, bf16=True)
    assert single.dtype == half.dtype == torch.float32
    assert 0 < (single - half).abs().max() < 0.05 * single.abs().max()


@pytest.mark.parametrize(
    ("precision", "training", "dtype"),
    [
        ("auto", "32", torch.float32),
        ("auto", "bf16-mixed", torch.bfloat16),
        ("32", "bf16-mixed", torch.float32),
        ("bf16", "32", torch.bfloat16),
    ],
)
def test_precision_of_cached_features(precision: Precision, training: str, dtype: torch.dtype) -> None:
    fabric = make_fabric(TrainConfig(accelerator="cpu", precision=training))
    with features_autocast(precision, fabric)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.mark.parametrize(
    ("precision", "capabilities", "bf16"),
    [
        ("auto", {}, False),
        ("auto", {"avx512_bf16": True}, True),
        ("32", {"avx512_bf16": True}, False),
        ("bf16", {}, True),
    ],
)
def test_prediction_is_in_bf16_on_cpus_that_are_fast_at_it(
    precision: str, capabilities: dict[str, bool], bf16: bool, step_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    predictor = load(step_dir, "cpu", precision)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(predictor.logits(images), predictor.model.predict(images, bf16))
    assert predictor.bf16 == bf16


def test_prediction_refuses_another_precision(step_dir: Path) -> None:
    with pytest.raises(UserError, match="precision: expected auto, 32 or bf16, got 'fp8'"):
        load(step_dir, "cpu", "fp8")
