"""Every registered method passes the contract (:mod:`starseg.contract`); by default, one check of each is run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration
from rich.console import Console

from starseg.config import parse_config
from starseg.contract import CHECKS, MethodHarness, check_resume, check_run, tiny_settings
from starseg.contract.checks import gradients_reach_what_learns
from starseg.data.shapes import write_shapes
from starseg.engine.checkpoint import load_model
from starseg.engine.evaluate import evaluate_model
from starseg.methods import METHODS
from starseg.utils.files import read_json

NAMES = sorted(METHODS)
DEFAULTS = ["constellation", "star"]
"""Methods that the commands take by default."""


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    gradients_reach_what_learns(MethodHarness(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(name: str, check: object) -> None:
    check(MethodHarness(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_through_the_runner(name: str, shapes: Path, tmp_path: Path) -> None:
    check_run(name, shapes, tmp_path / "run")


@pytest.mark.parametrize("name", [n if n in DEFAULTS else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_an_interrupted_step_resumes(name: str, shapes: Path, tmp_path: Path) -> None:
    check_resume(name, shapes, tmp_path)


def _on_two_processes(names: list[str], data: Path, out: Path) -> None:
    """Losses are compared in the contract; here the scores of two processes equal those of the saved model."""
    command = [sys.executable, str(Path(__file__).with_name("two_processes.py")), str(data), str(out), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        assert not METHODS[name].one_process
        config = parse_config(tiny_settings(name, data, out / name))
        last = max((out / name).glob("step_*"))
        model, info = load_model(last)
        again = evaluate_model(model, info, config, Console(quiet=True))
        assert again["iou"] == read_json(last / "metrics.json")["iou"], name


def test_two_processes(shapes: Path, tmp_path: Path) -> None:
    _on_two_processes(DEFAULTS, shapes, tmp_path)


@pytest.mark.processes
def test_every_method_on_two_processes(shapes: Path, tmp_path: Path) -> None:
    _on_two_processes(NAMES, shapes, tmp_path)


def _on_another_device(names: list[str], data: Path, out: Path) -> None:
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this release of torch has no devices written in Python")
    command = [sys.executable, str(Path(__file__).with_name("another_device.py")), str(data), str(out), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="session")
def few_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the images of :func:`shapes`: every iteration on the other device goes through Python."""
    return write_shapes(tmp_path_factory.mktemp("few") / "data", train=24, val=6, size=64, classes=5)


def test_another_device(few_shapes: Path, tmp_path: Path) -> None:
    """No tensor of the device is mixed with one of the CPU, tested without a GPU."""
    _on_another_device(["star"], few_shapes, tmp_path)


@pytest.mark.slow
def test_every_method_on_another_device(few_shapes: Path, tmp_path: Path) -> None:
    _on_another_device(NAMES, few_shapes, tmp_path)
