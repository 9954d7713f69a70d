"""One process and two give the same: bank, losses, weights, confusion matrix."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from starseg.engine.checkpoint import read_json

pytestmark = pytest.mark.processes


def _train(tiny: dict, out: Path, *args: str) -> Path:
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**tiny, "out": str(out)}))
    command = [sys.executable, "-m", "starseg", "train", str(config), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 1: learning") == 1, "only one process prints"
    return out


def _losses(run: Path, step: int) -> dict[str, list[float]]:
    events = EventAccumulator(str(run / f"step_{step}" / "logs")).Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if tag.startswith("loss/")}


def test_star_on_one_process_and_on_two(tiny: dict, tmp_path: Path) -> None:
    tiny["train"]["batch_size"] = 6
    one = _train(tiny, tmp_path / "one")
    # Batch norm of a base step is per process on a CPU, so the base step is shared; later steps freeze it.
    tiny["start_from"] = str(one / "step_0")
    two = _train(tiny, tmp_path / "two", "--devices", "2")
    for step in (1, 2):
        ours, theirs = _losses(one, step), _losses(two, step)
        assert ours.keys() == theirs.keys() and len(ours["loss/loss"]) > 1
        for name in ours:
            # float32 sums in another order, then a few optimizer steps on top of the difference
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
        a, b = (load_file(run / f"step_{step}" / "bank.safetensors") for run in (one, two))
        assert torch.equal(a["counts"], b["counts"])
        old = len(a["prototypes"]) - 1
        for name in ("prototypes", "noise", "norm_mean", "norm_std"):
            torch.testing.assert_close(a[name][:old], b[name][:old], rtol=1e-3, atol=1e-5)
    a, b = (read_json(run / "step_2" / "metrics.json")["confusion"] for run in (one, two))
    difference = (torch.tensor(a) - torch.tensor(b)).abs().sum() / torch.tensor(a).sum()
    assert difference < 0.01


def test_the_same_weights_give_the_same_bank_and_confusion_matrix(tiny: dict, tmp_path: Path) -> None:
    tiny["train"]["batch_size"] = 6
    one = _train(tiny, tmp_path / "one", "--steps", "0-1")
    weights = load_file(one / "step_1" / "model.safetensors")
    tiny["train"]["later"] |= {"lr": 1e-30}
    tiny["start_from"] = str(one / "step_0")
    runs = [_train(tiny, tmp_path / f"still{n}", "--steps", "0-1", "--devices", str(n)) for n in (1, 2)]
    still = [load_file(run / "step_1" / "model.safetensors") for run in runs]
    assert all(torch.equal(still[0][k], still[1][k]) for k in weights if not k.startswith("heads.1"))
    banks = [load_file(run / "step_1" / "bank.safetensors") for run in runs]
    assert torch.equal(banks[0]["counts"], banks[1]["counts"])
    for name, value in banks[0].items():
        torch.testing.assert_close(value, banks[1][name], rtol=1e-5, atol=1e-7)
    a, b = (read_json(run / "step_1" / "metrics.json")["confusion"] for run in runs)
    assert a == b


def test_two_nodes_started_by_torchrun(tiny: dict, tmp_path: Path) -> None:
    """Two launcher groups on loopback, each a node with one process."""
    tiny["train"]["batch_size"] = 6
    one = _train(tiny, tmp_path / "one", "--steps", "0-1")
    out = tmp_path / "nodes"
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**tiny, "out": str(out), "start_from": str(one / "step_0")}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    place = ["--master-addr=127.0.0.1", f"--master-port={port}"]
    job = ["-m", "starseg", "train", str(config), "--steps", "0-1", "--num-nodes", "2"]
    nodes = [
        subprocess.Popen([*launcher, f"--node-rank={rank}", *place, *job], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    texts = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert "step 1: learning" in texts[0] and "step 1: learning" not in texts[1]
    ours, theirs = _losses(one, 1), _losses(out, 1)
    for name in ours:
        assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=1e-6), name
