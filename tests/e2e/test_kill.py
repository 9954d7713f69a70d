"""A run killed at any moment ends, with the same command, as one that was never interrupted."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from e2e.kill_at import MOMENTS, Starter
from starseg.config import load_config
from starseg.engine.rundir import claim, resolve
from starseg.engine.runner import train
from starseg.utils.files import read_json

# The largest counts: small enough to be reached, and for a run to live through many kills.
COUNTS = {"scan before": 3, "iteration": 12, "scan after": 3, "write": 6, "rename": 5, "publish": 2, "test": 1}


@pytest.fixture
def longer(tiny: dict) -> dict:
    tiny["train"] |= {"base": {"epochs": 3, "lr": 0.01}, "later": {"epochs": 3, "lr": 0.001}}
    return {**tiny, "memory": {"size": 3}}


def _config(settings: dict, out: Path) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, "out": str(out)}))
    return path


def _compare(a: Path, b: Path, steps: range) -> None:
    for step in steps:
        for name in ("model.safetensors", "bank.safetensors"):
            left, right = (load_file(run / f"step_{step}" / name) for run in (a, b))
            assert left.keys() == right.keys()
            assert all(torch.equal(left[k], right[k]) for k in left), f"step {step} {name}"
        left, right = (read_json(run / f"step_{step}" / "metrics.json") for run in (a, b))
        drop = {"seconds"}
        assert {k: v for k, v in left.items() if k not in drop} == {k: v for k, v in right.items() if k not in drop}
        left, right = (run / f"step_{step}" for run in (a, b))
        assert {p.name for p in left.iterdir()} == {p.name for p in right.iterdir()}


def _disturb(
    starter: Starter, settings: dict, tmp_path: Path, kills: list[tuple[str, int]], steps: range
) -> list[tuple[str, int]]:
    """Kill a run at each of the moments, let it end, compare it with an undisturbed one; the kills that happened."""
    last = ("--steps", f"0-{steps[-1]}")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(load_config(_config(settings, calm)), steps, Console(quiet=True))
    config, hits = _config(settings, killed), []
    for kill in kills:
        done = starter.run("train", str(config), *last, kill=kill)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert done.stdout.splitlines()[-1] == "killed at {}, call {}".format(*kill)
        hits.append(kill)
    done = starter.run("train", str(config), *last)
    assert done.returncode == 0, done.stderr
    _compare(calm, killed, steps)
    print("\n".join(f"killed at {moment}, call {count}" for moment, count in hits))
    return hits


def _draw(seed: int, more: int = 0) -> list[tuple[str, int]]:
    """Every moment once, and ``more`` of those that come many times in a step."""
    draw = random.Random(seed)
    moments = [*MOMENTS, *draw.choices(["iteration", "write", "rename"], k=more)]
    draw.shuffle(moments)
    return [(moment, draw.randint(1, COUNTS[moment])) for moment in moments]


def test_one_kill_in_an_epoch_and_one_in_a_write(starter: Starter, longer: dict, tmp_path: Path) -> None:
    kills = [("iteration", 13), ("rename", 2)]
    assert _disturb(starter, longer, tmp_path, kills, range(1)) == kills


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_every_kind_of_moment(starter: Starter, longer: dict, tmp_path: Path, seed: int) -> None:
    hits = _disturb(starter, longer, tmp_path, _draw(seed), range(3))
    assert {moment for moment, _ in hits} == set(MOMENTS)


@pytest.mark.kill
@pytest.mark.slow
def test_twenty_kills(starter: Starter, longer: dict, tmp_path: Path) -> None:
    for phase in ("base", "later"):
        longer["train"][phase]["epochs"] = 12
    hits = _disturb(starter, longer, tmp_path, _draw(20, 15), range(3))
    assert len(hits) >= 20 and {moment for moment, _ in hits} == set(MOMENTS)


@pytest.mark.kill
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_saves_first(starter: Starter, longer: dict, tmp_path: Path, number: int, workers: int) -> None:
    """Sent to the run alone, and to its loader workers too, as batch systems do; these start in a scan."""
    longer["train"]["later"]["epochs"], longer["data"]["workers"] = 30, workers
    config = str(_config(longer, tmp_path / "run"))
    assert starter.run("train", config, "--steps", "0").returncode == 0
    pid = starter.start("train", config, "--steps", "1")
    state, end = tmp_path / "run" / "step_1" / "resume.ckpt", time.monotonic() + 300
    while not state.is_file() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) >= workers
    for process in (*children, pid):
        os.kill(int(process), number)
    done = starter.wait()
    assert done.returncode == 128 + number, done
    assert "the same command goes on from there" in done.stderr and "Traceback" not in done.stderr
    again = starter.run("train", config, "--steps", "1")
    assert again.returncode == 0 and "going on," in again.stdout
    assert not state.is_file()


def test_a_damaged_state_is_named_and_passed_over(starter: Starter, longer: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = str(_config(longer, out))
    killed = starter.run("train", config, "--steps", "0", kill=("iteration", 24))
    assert killed.returncode == -signal.SIGKILL
    state = out / "step_0" / "resume.ckpt"
    state.write_bytes(state.read_bytes()[:-10])
    again = starter.run("train", config, "--steps", "0")
    assert again.returncode == 0, again.stderr
    text = again.stdout.replace("\n", " ")
    assert f"{state}: damaged, going on from the state before" in text and "going on, 10 of 30" in text


def test_a_changed_configuration_and_a_second_process_are_refused(
    starter: Starter, longer: dict, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = _config(longer, out)
    starter.run("train", str(config), "--steps", "0", kill=("iteration", 12))
    changed = starter.run("train", str(config), "train.base.lr=0.5", "--steps", "0")
    assert changed.returncode == 2 and "train.base.lr: 0.01 there, 0.5 now" in changed.stderr
    with claim(out, resolve(load_config(config))):
        second = starter.run("train", str(config), "--steps", "0")
    assert second.returncode == 2 and "another process (pid" in second.stderr
