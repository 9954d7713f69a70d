"""Devices and processes: what is set before a run, and what is refused."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.nn import BatchNorm2d, SyncBatchNorm

from starseg.config import TrainConfig
from starseg.engine.launch import make_fabric, refuse_other_number, refuse_without_compiler, synchronise_norm
from starseg.errors import UserError
from starseg.models import Segmenter


@pytest.fixture
def _algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.usefixtures("_algorithms")
def test_deterministic_sets_what_gpus_need() -> None:
    make_fabric(TrainConfig(accelerator="cpu"))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_fabric(TrainConfig(accelerator="cpu", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    ("device", "world", "synchronised"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_batch_norm_is_synchronised_on_several_gpus(device: str, world: int, synchronised: bool) -> None:
    model = Segmenter("test_resnet", [2])
    before = model.state_dict()
    fabric = SimpleNamespace(device=torch.device(device), world_size=world)
    changed = synchronise_norm(model, fabric)
    norms = [m for m in changed.modules() if isinstance(m, (BatchNorm2d, SyncBatchNorm))]
    assert norms and all(isinstance(m, SyncBatchNorm) == synchronised for m in norms)
    after = changed.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    changed.freeze_norm()
    changed.train()
    assert not any(m.training or m.weight.requires_grad for m in norms)


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4"}),
        ("SLURM", {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "star"}),
    ],
)
def test_a_launcher_starts_what_is_configured(
    launcher: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_other_number(TrainConfig(devices=2))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuse_other_number(TrainConfig(devices=2, num_nodes=2))
    with pytest.raises(UserError, match=rf"{launcher} started 4 processes, but train.devices \(1\) times .* is 1"):
        refuse_other_number(TrainConfig())


def test_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train.compile: .* C\+\+ compiler no-such-compiler, which is not installed"):
        refuse_without_compiler(torch.device("cpu"))
