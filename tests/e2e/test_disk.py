"""A full disk stops a run and leaves its last good state intact."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from e2e.kill_at import Starter
from starseg.engine import state as resume

pytestmark = pytest.mark.kill


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _train(starter: Starter, settings: dict, out: Path) -> subprocess.CompletedProcess:
    config = out.parent.parent / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump({**settings, "out": str(out)}))
    return starter.run("train", str(config), "--steps", "0")


def test_a_full_disk(starter: Starter, tiny: dict, tmp_path: Path, small_disk: Path) -> None:
    tiny["train"]["base"]["epochs"] = 3
    calm = tmp_path / "other" / "calm"
    calm.parent.mkdir()
    assert _train(starter, tiny, calm).returncode == 0
    # Room for one saved state, which is kept, and for half of the next.
    weights = calm / "step_0" / "model.safetensors"
    state = 2 * weights.stat().st_size  # Weights and momentum.
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(40 * 2**20 - int(1.5 * state)))
    run = small_disk / "run"
    full = _train(starter, tiny, run)
    assert full.returncode == 2, full.stderr
    assert "No space left on device" in full.stderr and "Traceback" not in full.stderr
    kept = [resume.decode(p.read_bytes()) for p in (run / "step_0").glob("resume*.ckpt")]
    assert kept and all(s.iteration for s in kept)
    assert not list((run / "step_0").glob(".*.tmp"))
    ballast.unlink()
    again = _train(starter, tiny, run)
    assert again.returncode == 0 and "resuming at iteration" in again.stdout, again.stderr
    a, b = (load_file(r / "step_0" / "model.safetensors") for r in (calm, run))
    assert all(torch.equal(a[k], b[k]) for k in a)
