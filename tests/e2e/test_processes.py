"""One process and several give the same bank, losses, weights and confusion matrix."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from e2e.nodes import DEVICE, NotPermitted, two_nodes
from starseg.config import parse_config
from starseg.engine.runner import train
from starseg.utils.files import read_json

pytestmark = pytest.mark.processes
_QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def settings(tiny_tree: dict) -> dict:
    """A run with a batch that two processes can share."""
    return {**tiny_tree, "train": {**tiny_tree["train"], "batch_size": 6}}


@pytest.fixture(scope="module")
def one(settings: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, trained by one process."""
    return train(parse_config({**settings, "out": str(tmp_path_factory.mktemp("one") / "run")}), None, _QUIET)


@pytest.fixture
def shared(settings: dict, one: Path) -> dict:
    """It, with the base step of :func:`one`: batch norm there is per process on a CPU, and later steps freeze it."""
    return {**settings, "start_from": str(one / "step_0")}


def _config(settings: dict, out: Path) -> Path:
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**settings, "out": str(out)}))
    return config


def _train(settings: dict, out: Path, *args: str) -> Path:
    command = [sys.executable, "-m", "starseg", "train", str(_config(settings, out)), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 1: learning") == 1, "only one process prints"
    return out


def _losses(run: Path, step: int) -> dict[str, list[float]]:
    events = EventAccumulator(str(run / f"step_{step}" / "logs")).Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag.startswith("loss/")}


def _same_losses(one: Path, two: Path, step: int) -> None:
    ours, theirs = _losses(one, step), _losses(two, step)
    assert ours.keys() == theirs.keys() and len(ours["loss/loss"]) > 1
    for name in ours:
        # float32 sums in another order, then a few optimizer steps on top of the difference
        assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name


def test_star_on_one_process_and_on_two(shared: dict, one: Path, tmp_path: Path) -> None:
    two = _train(shared, tmp_path / "two", "--devices", "2")
    for step in (1, 2):
        _same_losses(one, two, step)
        a, b = (load_file(run / f"step_{step}" / "bank.safetensors") for run in (one, two))
        assert torch.equal(a["counts"], b["counts"])
        old = len(a["prototypes"]) - 1
        for name in ("prototypes", "noise", "norm_mean", "norm_std"):
            torch.testing.assert_close(a[name][:old], b[name][:old], rtol=1e-3, atol=1e-5)
    a, b = (read_json(run / "step_2" / "metrics.json")["confusion"] for run in (one, two))
    difference = (torch.tensor(a) - torch.tensor(b)).abs().sum() / torch.tensor(a).sum()
    assert difference < 0.01


def test_the_same_weights_give_the_same_bank_and_confusion_matrix(shared: dict, one: Path, tmp_path: Path) -> None:
    weights = load_file(one / "step_1" / "model.safetensors")
    still = {**shared, "train": {**shared["train"], "later": {"epochs": 1, "lr": 1e-30}}}
    runs = [
        train(parse_config({**still, "out": str(tmp_path / "still1")}), range(2), _QUIET),
        _train(still, tmp_path / "still2", "--steps", "0-1", "--devices", "2"),
    ]
    models, banks = ([load_file(run / "step_1" / f"{n}.safetensors") for run in runs] for n in ("model", "bank"))
    assert all(torch.equal(models[0][k], models[1][k]) for k in weights if not k.startswith("heads.1"))
    assert torch.equal(banks[0]["counts"], banks[1]["counts"])
    for name, value in banks[0].items():
        torch.testing.assert_close(value, banks[1][name], rtol=1e-5, atol=1e-7)
    a, b = (read_json(run / "step_1" / "metrics.json")["confusion"] for run in runs)
    assert a == b


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _in_two_processes(commands: list[list[str]], environments: list[dict[str, str]]) -> list[str]:
    """What two processes print that are started together, the leader first."""
    nodes = [
        subprocess.Popen(command, env={**os.environ, **more}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, more in zip(commands, environments, strict=True)
    ]
    texts = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    outs = [out for out, _ in texts]
    assert "step 1: learning" in outs[0] and "step 1: learning" not in outs[1]
    return outs


def test_two_nodes_started_by_torchrun(shared: dict, one: Path, tmp_path: Path) -> None:
    """Two launcher groups on loopback, each a node with one process."""
    job = ["-m", "starseg", "train", str(_config(shared, tmp_path / "nodes")), "--steps", "0-1", "--num-nodes", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    place = ["--master-addr=127.0.0.1", f"--master-port={_free_port()}"]
    _in_two_processes([[*launcher, f"--node-rank={rank}", *place, *job] for rank in range(2)], [{}, {}])
    _same_losses(one, tmp_path / "nodes", 1)


@pytest.mark.parametrize("nodes", [1, 2])
def test_two_tasks_started_by_slurm(nodes: int, shared: dict, one: Path, tmp_path: Path) -> None:
    """What srun sets, on one node and on two; one of them with --ntasks alone, which Fabric refuses by itself."""
    job = [sys.executable, "-m", "starseg", "train", str(_config(shared, tmp_path / "tasks")), "--steps", "0-1"]
    job += ["--devices", "2"] if nodes == 1 else ["--num-nodes", "2"]
    common = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "star",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": str(nodes),
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "MASTER_PORT": str(_free_port()),
    }
    if nodes == 2:
        common["SLURM_NTASKS_PER_NODE"] = "1"
    ranks = [
        {
            **common,
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank if nodes == 1 else 0),
            "SLURM_NODEID": str(0 if nodes == 1 else rank),
        }
        for rank in range(2)
    ]
    _in_two_processes([job, job], ranks)
    _same_losses(one, tmp_path / "tasks", 1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[tuple[str, str]]]:
    try:
        with two_nodes() as created:
            yield created
    except NotPermitted as error:
        pytest.skip(f"needs two network namespaces: {error}")


@pytest.mark.parametrize("method", ["star", "constellation"])
def test_two_nodes_of_two_processes(method: str, tiny_tree: dict, nodes: list[tuple[str, str]], tmp_path: Path) -> None:
    """Four processes on two nodes that share no network device, not even loopback."""
    settings = {**tiny_tree, "method": method, "train": {**tiny_tree["train"], "batch_size": 8}}
    one = train(parse_config({**settings, "out": str(tmp_path / "one")}), range(2), _QUIET)
    config = _config({**settings, "start_from": str(one / "step_0")}, tmp_path / "four")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    place = [f"--master-addr={nodes[0][1]}", "--master-port=29500"]
    job = ["-m", "starseg", "train", str(config), "--steps", "0-1", "--devices", "2", "--num-nodes", "2"]
    commands = [
        ["ip", "netns", "exec", name, *launcher, f"--node-rank={rank}", *place, *job]
        for rank, (name, _) in enumerate(nodes)
    ]
    _in_two_processes(commands, [{"GLOO_SOCKET_IFNAME": DEVICE}] * 2)
    four = tmp_path / "four"
    a, b = (load_file(run / "step_1" / "bank.safetensors") for run in (one, four))
    ours, theirs = (torch.tensor(read_json(run / "step_1" / "metrics.json")["confusion"]) for run in (one, four))
    difference = (ours - theirs).abs().sum() / ours.sum()
    if method == "star":
        _same_losses(one, four, 1)
        assert torch.equal(a["counts"], b["counts"]) and difference < 0.01
        for name in ("prototypes", "noise", "norm_mean", "norm_std"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    else:
        # Each process draws its batches of features, and the cells from which a mixture starts, from its own images.
        assert torch.equal(a["counts"][1:], b["counts"][1:]) and difference < 0.05
        assert a["counts"][0] == pytest.approx(float(b["counts"][0]), rel=0.01)
        old = (a["owners"] > 0) & (a["owners"] < 4)
        assert torch.equal(a["owners"], b["owners"]) and torch.equal(a["means"][old], b["means"][old])
