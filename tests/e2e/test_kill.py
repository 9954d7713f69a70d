"""A run killed at any moment ends, with the same command, as one that was never interrupted."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from e2e.kill_at import MOMENTS
from starseg.engine.checkpoint import read_json

KILLER = Path(__file__).with_name("kill_at.py")
# The largest counts: small enough to be reached, and for a run to live through many kills.
COUNTS = {"scan": 6, "iteration": 12, "write": 6, "rename": 5, "publish": 2, "test": 1}


@pytest.fixture
def longer(tiny: dict) -> dict:
    tiny["train"] |= {"base": {"epochs": 3, "lr": 0.01}, "later": {"epochs": 3, "lr": 0.001}}
    return {**tiny, "memory": {"size": 3}}


def _config(settings: dict, out: Path) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**settings, "out": str(out)}))
    return path


def _run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


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


def _disturb(settings: dict, tmp_path: Path, kills: list[tuple[str, int]], steps: range) -> list[str]:
    """Kill a run at each of the moments, let it end, compare it with an undisturbed one; what the kills hit."""
    last = ("--steps", f"0-{steps[-1]}")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    done = _run("-m", "starseg", "train", str(_config(settings, calm)), *last)
    assert done.returncode == 0, done.stderr
    config, hits = _config(settings, killed), []
    for moment, count in kills:
        done = _run(str(KILLER), moment, str(count), "train", str(config), *last)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        hits.append(done.stdout.splitlines()[-1])
    done = _run("-m", "starseg", "train", str(config), *last)
    assert done.returncode == 0, done.stderr
    _compare(calm, killed, steps)
    return hits


def _draw(seed: int, count: int) -> list[tuple[str, int]]:
    draw = random.Random(seed)
    moments = [*MOMENTS] + [draw.choice([*MOMENTS]) for _ in range(count - len(MOMENTS))]
    draw.shuffle(moments)
    return [(moment, draw.randint(1, COUNTS[moment])) for moment in moments]


def test_one_kill_in_an_epoch_and_one_in_a_write(longer: dict, tmp_path: Path) -> None:
    hits = _disturb(longer, tmp_path, [("iteration", 13), ("rename", 2)], range(1))
    assert len(hits) == 2


@pytest.mark.kill
@pytest.mark.parametrize("seed", range(2))
def test_kills_at_every_kind_of_moment(longer: dict, tmp_path: Path, seed: int) -> None:
    hits = _disturb(longer, tmp_path, _draw(seed, 7), range(3))
    print("\n".join(hits))
    assert len(hits) >= 5


@pytest.mark.kill
@pytest.mark.slow
def test_twenty_kills(longer: dict, tmp_path: Path) -> None:
    hits = _disturb(longer, tmp_path, _draw(20, 24), range(3))
    print("\n".join(hits))
    assert len(hits) >= 20 and {hit.split()[2] for hit in hits} == set(MOMENTS)


@pytest.mark.kill
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(longer: dict, tmp_path: Path, number: int) -> None:
    longer["train"]["base"]["epochs"] = 40
    config = _config(longer, tmp_path / "run")
    command = [sys.executable, "-m", "starseg", "train", str(config), "--steps", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "run" / "step_0" / "resume.ckpt"
    while not state.is_file() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, (out, err)
    assert "the same command goes on from there" in err and "Traceback" not in err
    again = _run("-m", "starseg", "train", str(config), "--steps", "0")
    assert again.returncode == 0 and "going on," in again.stdout
    assert not state.is_file()


def test_a_damaged_state_is_named_and_passed_over(longer: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = _config(longer, out)
    killed = _run(str(KILLER), "iteration", "24", "train", str(config), "--steps", "0")
    assert killed.returncode == -signal.SIGKILL
    state = out / "step_0" / "resume.ckpt"
    state.write_bytes(state.read_bytes()[:-10])
    again = _run("-m", "starseg", "train", str(config), "--steps", "0")
    assert again.returncode == 0, again.stderr
    text = again.stdout.replace("\n", " ")
    assert f"{state}: damaged, going on from the state before" in text and "going on, 10 of 30" in text


def test_a_changed_configuration_and_a_second_process_are_refused(longer: dict, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = _config(longer, out)
    _run(str(KILLER), "iteration", "12", "train", str(config), "--steps", "0")
    changed = _run("-m", "starseg", "train", str(config), "train.base.lr=0.5", "--steps", "0")
    assert changed.returncode == 2 and "train.base.lr: 0.01 there, 0.5 now" in changed.stderr
    from starseg.config import load_config
    from starseg.engine.rundir import claim, resolve
    from starseg.methods import METHODS, method_options

    settings = load_config(config)
    method = METHODS["star"](method_options("star", settings))
    with claim(out, resolve(settings, method.defaults("voc"))):
        second = _run("-m", "starseg", "train", str(config), "--steps", "0")
    assert second.returncode == 2 and "another process (pid" in second.stderr
