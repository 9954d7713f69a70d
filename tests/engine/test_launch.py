"""Devices and processes: settings made before a run, and refused configurations."""

import os
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import BatchNorm2d, SyncBatchNorm

from starseg.config import TrainConfig, parse_config
from starseg.engine.launch import check_world_size, make_fabric, refuse_without_compiler, synchronise_norm
from starseg.engine.run_data import workers_for
from starseg.errors import UserError
from starseg.models import Architecture, make_network
from starseg.models.classifiers import HeadLayout


@pytest.fixture
def _algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark, tf32 = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, tf32


@pytest.mark.usefixtures("_algorithms")
def test_deterministic_sets_what_gpus_need() -> None:
    make_fabric(TrainConfig(accelerator="cpu"))
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_fabric(TrainConfig(accelerator="cpu", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.benchmark


def _norms(module: nn.Module) -> list[BatchNorm2d | SyncBatchNorm]:
    return [m for m in module.modules() if isinstance(m, (BatchNorm2d, SyncBatchNorm))]


@pytest.mark.parametrize(
    ("device", "world", "synchronised"), [("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)]
)
def test_batch_norm_is_synchronised_on_several_gpus(device: str, world: int, synchronised: bool) -> None:
    model = make_network(Architecture("test_resnet"), [2])
    before = model.state_dict()
    fabric = SimpleNamespace(device=torch.device(device), world_size=world)
    synchronise_norm(model, fabric)
    norms = _norms(model)
    assert norms and all(isinstance(m, SyncBatchNorm) == synchronised for m in norms)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    model.freeze_norm()
    model.train()
    assert not any(m.training or m.weight.requires_grad for m in norms)


def test_frozen_batch_norm_stays_fused_with_its_convolution() -> None:
    """As in later steps, of which some train the batch norms of their new head alone."""
    model = make_network(Architecture("test_resnet"), [2, 1], layout=HeadLayout(conv=True))
    fused = [norm.fused for norm in _norms(model.encoder)]
    model.freeze_all_but(model.heads[-1:])
    synchronise_norm(model.train(), SimpleNamespace(device=torch.device("cuda"), world_size=2))
    assert any(fused) and [norm.fused for norm in _norms(model.encoder)] == fused
    norms = {name: isinstance(m, SyncBatchNorm) for name, m in model.named_modules() if m in _norms(model)}
    assert norms == {name: name.startswith("heads.1") for name in norms} and any(norms.values())
    assert {name for name, m in model.train().named_modules() if m in _norms(model) and m.training} == {
        name for name, synchronised in norms.items() if synchronised
    }


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
    check_world_size(TrainConfig(devices=2))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_world_size(TrainConfig(devices=2, num_nodes=2))
    with pytest.raises(UserError, match=rf"{launcher} started 4 processes, but train.devices \(1\) times .* is 1"):
        check_world_size(TrainConfig())


@pytest.mark.usefixtures("_algorithms")
def test_float32_does_not_use_tf32() -> None:
    make_fabric(TrainConfig(accelerator="cpu"))
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("device", "devices", "started_by", "shared", "workers"),
    [
        ("cuda", 1, "", 2**40, 8),
        ("cuda", 4, "", 2**40, 4),
        ("cuda", 32, "", 2**40, 1),
        ("cuda", 4, "srun", 2**40, 8),
        ("cuda", 1, "", 2**30, 3),
        ("cuda", 1, "", 2**26, 0),
        ("cpu", 4, "", 2**40, 0),
    ],
)
def test_loader_workers_share_cores_and_memory(
    device: str, devices: int, started_by: str, shared: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starseg.engine.run_data.cores", lambda: 16)
    monkeypatch.setattr("starseg.engine.run_data.free_shared_memory", lambda: shared)
    if started_by:
        monkeypatch.setenv("SLURM_NTASKS", "4")
    config = parse_config({"task": {"name": "15-1"}, "train": {"devices": devices, "batch_size": 64}})
    assert workers_for(config, SimpleNamespace(device=torch.device(device))) == workers


def test_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train.compile: .* C\+\+ compiler no-such-compiler, which is not installed"):
        refuse_without_compiler(torch.device("cpu"))
