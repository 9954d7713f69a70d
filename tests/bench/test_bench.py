"""The benchmark compares equal computations and measures memory correctly."""

import json
import sys
from pathlib import Path

import pytest
import torch

from starseg.bench.evaluation import measure_eval
from starseg.bench.machine import cpu_model, describe_machine
from starseg.bench.run import Case, LossPath, loss_cases, measure_growth
from starseg.bench.step import measure_step
from starseg.bench.timing import count_flops, peak_bytes
from starseg.cli.main import main


@pytest.mark.parametrize("name", loss_cases(128))
def test_both_implementations_give_the_same_loss_and_gradients(name: str) -> None:
    path = LossPath(loss_cases(128)[name])
    lean = path.lean()
    reached = [leaf for leaf in path.leaves if leaf.grad is not None]
    gradients = [leaf.grad.clone() for leaf in reached]
    torch.testing.assert_close(lean, path.dense(), rtol=1e-5, atol=0)
    assert len(gradients) == (1 if name == "ade_base" else 3)
    for got, leaf in zip(gradients, reached, strict=True):
        # No tolerance for single values: those near zero are sums of larger ones that cancel.
        assert (got - leaf.grad).abs().max() <= 1e-5 * leaf.grad.abs().max()


def test_peak_memory_excludes_what_is_freed_before_the_peak() -> None:
    def path() -> torch.Tensor:
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second.sum()

    assert 8e6 <= peak_bytes(path) < 8.2e6


def test_memory_hardly_grows_with_the_number_of_old_classes() -> None:
    """What grows are the gradients of the networks' outputs, which weigh more in a small crop."""
    found = measure_growth(Case(1, 2, 2, 256, "ade"))
    assert found["growth"] < 1.25 < 3 < found["dense_growth"]


@pytest.mark.parametrize(("text", "name"), [("model name\t: AMD EPYC\nflags: a", "AMD EPYC"), ("x", "unknown CPU")])
def test_cpu_model(text: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert cpu_model(file) == name and cpu_model(tmp_path / "none") == "unknown CPU"


def test_operations_are_counted() -> None:
    weight, images = torch.ones(2, 3, 3, 3), torch.ones(1, 3, 8, 8)
    assert count_flops(lambda: torch.nn.functional.conv2d(images, weight, padding=1)) == 2 * 2 * 27 * 64


def test_bf16_is_measured_where_the_hardware_is_fast_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    step = measure_step(Case(3, 1, 2, 64, "voc"), 1, "test_resnet")
    evaluation = measure_eval(3, 2, 2, 64, 1, "test_resnet")
    assert describe_machine(1)["speed"].keys() == {"float32", "bfloat16"}
    for found in (step, evaluation):
        assert found["bf16_speedup"] > 0 and found["speed"].keys() == {"float32", "bfloat16"}


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["starseg", "bench", "--quick", "--json", str(file)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    found = json.loads(file.read_text())
    assert found.keys() == {"machine", "loss", "memory_growth", "step", "data", "eval"}
    assert found["machine"]["cpu"] and found["machine"]["speed"]["float32"]["matrix"] > 0
    for measured in (found["step"]["voc_15-1"], found["eval"]["voc"], found["eval"]["ade"]):
        speed = measured["speed"]["float32"]
        assert speed["gflops"] > 0 and speed["machine_matrix"] > 0
        assert speed["of_convolution"] == speed["gflops"] / speed["machine_convolution"]
    assert {"speedup", "seconds", "dense_seconds", "parts"} <= found["data"]["pipeline"].keys()
    assert {"speedup", "memory_ratio", "seconds", "dense_seconds", "split"} <= found["step"]["voc_15-1"].keys()
    assert all(found["eval"][name]["differing_pixels"] <= 1e-5 for name in ("voc", "ade"))
    for case in ("voc_15-1", "ade_100-10", "ade_base"):
        assert {"speedup", "memory_ratio", "seconds", "dense_seconds"} <= found["loss"][case].keys()
    assert "ade_100-10" in capsys.readouterr().out
