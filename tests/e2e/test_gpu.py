"""A run on a GPU equals one on a CPU up to rounding, is repeatable on request, and does not wait for the GPU."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from starseg.config import parse_config
from starseg.contract import check_resume, tiny_settings
from starseg.data.samples import Batch
from starseg.engine.checkpoint import load_bank, load_model
from starseg.engine.fit import StepTraining
from starseg.experiments.train import train
from starseg.inference.predictor import load
from starseg.methods import METHODS
from starseg.utils.files import read_json

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
_QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A deterministic run changes settings of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.set_sync_debug_mode("default")


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


@contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _train_two_steps(name: str, data: Path, out: Path, watch: Callable[[], AbstractContextManager[object]]) -> set[int]:
    """Train the first two steps; return the numbers of those whose iterations ran inside ``watch()``.

    The first iteration of a stage is not watched, because it counts what is replayed.
    """
    iterate, watched = StepTraining.iterate, set()

    def observed(training: StepTraining, raw: Batch) -> dict[str, Tensor]:
        if not training.iteration:
            return iterate(training, raw)
        watched.add(training.ctx.step)
        with watch():
            return iterate(training, raw)

    settings = tiny_settings(name, data, out, accelerator="gpu", precision="auto")
    del settings["task"]["steps"][2:]
    with patch.object(StepTraining, "iterate", observed):
        train(parse_config(settings), console=_QUIET)
    return watched


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_trains_two_steps_without_waiting_for_the_gpu(name: str, shapes: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watched = _train_two_steps(name, shapes, tmp_path / "run", partial(_sync_debug_mode, "warn"))
    steps = sorted((tmp_path / "run").glob("step_*"))
    assert len(steps) == (1 if name == "joint" else 2)
    assert watched == ({0} if name in ("joint", "segacil") else {0, 1})
    for step in steps:
        assert read_json(step / "metrics.json")["miou"]["all"] is not None
        assert all(value.isfinite().all() for value in load_model(step)[0].state_dict().values())
    image = torch.randint(0, 256, (3, 90, 120), dtype=torch.uint8)
    assert load(steps[-1], "cuda").predict(image).shape == (90, 120)
    waits = {f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "called a synchronizing" in str(w.message)}
    assert not waits, "\n".join(sorted(waits))


@pytest.mark.parametrize("name", ["star", "constellation"])
def test_an_iteration_passes_the_check_that_raises_errors(name: str, shapes: Path, tmp_path: Path) -> None:
    assert _train_two_steps(name, shapes, tmp_path / "run", partial(_sync_debug_mode, "error")) == {0, 1}


@pytest.mark.parametrize("name", ["star", "constellation"])
def test_deterministic_runs_are_equal(name: str, shapes: Path, tmp_path: Path) -> None:
    runs = []
    for folder in ("a", "b"):
        settings = tiny_settings(name, shapes, tmp_path / folder, accelerator="gpu", deterministic=True)
        runs.append(train(parse_config(settings), range(2), _QUIET))
    one, two = (load_model(run / "step_1")[0].state_dict() for run in runs)
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (load_bank(run / "step_1") for run in runs)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", ["star", "constellation"])
def test_a_deterministic_step_resumes_bitwise(name: str, shapes: Path, tmp_path: Path) -> None:
    check_resume(name, shapes, tmp_path, accelerator="gpu", deterministic=True)
