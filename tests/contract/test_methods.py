"""Every registered method keeps the contract (:mod:`starseg.contract`); the default run has one check of each."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from starseg.contract import CHECKS, Rehearsal, check_run, gradients_reach_what_learns, tiny_settings
from starseg.engine.checkpoint import read_json
from starseg.methods import METHODS

NAMES = sorted(METHODS)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    gradients_reach_what_learns(Rehearsal(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(name: str, check: object) -> None:
    check(Rehearsal(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_through_the_runner(name: str, shapes: Path, tmp_path: Path) -> None:
    check_run(name, shapes, tmp_path / "run")


@pytest.mark.processes
@pytest.mark.parametrize("name", NAMES)
def test_two_processes(name: str, shapes: Path, tmp_path: Path) -> None:
    """The same images scored, and a network that is one and the same; the losses are compared in the contract."""
    settings = tiny_settings(name, shapes, tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    last = 0 if name == "joint" else 1
    command = [sys.executable, "-m", "starseg", "train", str(config), "--devices", "2", "--steps", f"0-{last}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = read_json(tmp_path / "run" / f"step_{last}" / "metrics.json")
    images = metrics["confusion"]
    assert sum(map(sum, images)) > 0 and 0 <= metrics["miou"]["all"] <= 100
