"""Two processes that want the same run directory at the same moment: one gets it, the other says who has it."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from starseg.config import dump_config, parse_config
from starseg.engine import state as resume
from starseg.engine.rundir import claim, lock, resolve
from starseg.errors import UserError

ROUNDS = 20
_FORK = multiprocessing.get_context("fork")


def _resolved(settings: dict, out: Path, **changed: Any) -> Any:
    return resolve(parse_config({**settings, "out": str(out), **changed}))


def _claims(rank: int, settings: dict, folder: Path, gate: Any, results: Any) -> None:
    """Claim one directory after another together with another process; odd ones with another configuration."""
    for number in range(ROUNDS):
        config = _resolved(settings, folder / str(number), seed=rank * (number % 2))
        gate.wait()
        try:
            lock, answer = claim(config.run_dir, config), "mine"
        except UserError as error:
            lock, answer = None, str(error)
        results.put((number, answer, dump_config(config)))
        gate.wait()
        if lock:
            lock.close()


def test_one_of_two_claims_is_granted(tiny: dict, tmp_path: Path) -> None:
    gate, results = _FORK.Barrier(2, timeout=60), _FORK.Queue()
    both = [_FORK.Process(target=_claims, args=(rank, tiny, tmp_path, gate, results)) for rank in range(2)]
    for process in both:
        process.start()
    answers = [results.get(timeout=60) for _ in range(2 * ROUNDS)]
    for process in both:
        process.join(60)
    for number in range(ROUNDS):
        (refusal, _), (granted, config) = sorted((text, c) for n, text, c in answers if n == number)
        run = tmp_path / str(number)
        assert granted == "mine" and refusal.startswith(f"{run}: another process (pid "), (refusal, granted)
        assert (run / "config.yaml").read_text() == config
        assert {p.name for p in run.iterdir()} == {".lock", "config.yaml"}


def test_a_claim_in_another_s_first_moments(tiny: dict, tmp_path: Path) -> None:
    """What lies there before its config.yaml does, even for good because it was killed, does not look foreign."""
    config = _resolved(tiny, tmp_path / "run")
    config.run_dir.mkdir()
    (config.run_dir / ".lock").touch()
    (config.run_dir / ".config.yaml.tmp").write_text("half")
    with claim(config.run_dir, config):
        assert (config.run_dir / "config.yaml").read_text() == dump_config(config)
        assert not (config.run_dir / ".config.yaml.tmp").exists()
    (config.run_dir / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config.yaml: damaged, not valid YAML"):
        claim(config.run_dir, config)


@pytest.mark.processes
def test_two_runs_started_together(tiny: dict, tmp_path: Path) -> None:
    tiny["train"]["base"]["epochs"] = 2000  # one of them is still training when the other looks
    run, config = Path(tiny["out"]), tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny))
    command = [sys.executable, "-m", "starseg", "train", str(config), "--steps", "0"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    state, end = run / "step_0" / resume.CURRENT, time.monotonic() + 300
    while not state.is_file() or all(r.poll() is None for r in runs):
        assert time.monotonic() < end and any(r.poll() is None for r in runs)
        time.sleep(0.05)
    (loser,) = (r for r in runs if r.poll() is not None)
    (winner,) = (r for r in runs if r is not loser)
    message = loser.communicate()[1]
    assert loser.returncode == 2 and f"{run}: another process (pid {winner.pid}) is running" in message.replace(
        "\n", ""
    )
    assert "Traceback" not in message
    winner.send_signal(signal.SIGTERM)
    out, _ = winner.communicate(timeout=60)
    assert winner.returncode == 128 + signal.SIGTERM and out.count("step 0: learning") == 1
    assert resume.decode(state.read_bytes()) is not None
    assert {p.name for p in run.iterdir()} == {".lock", "config.yaml", "step_0"}


def _outlive(begun: Any) -> None:
    begun.set()
    time.sleep(60)


def test_a_worker_that_outlives_its_run_holds_no_lock(tmp_path: Path) -> None:
    held, begun = lock(tmp_path), _FORK.Event()
    worker = _FORK.Process(target=_outlive, args=(begun,))
    worker.start()
    try:
        assert begun.wait(30)
        with pytest.raises(UserError, match="another process"):
            lock(tmp_path)
        held.close()
        lock(tmp_path).close()
    finally:
        worker.kill()
        worker.join()
