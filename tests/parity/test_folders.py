"""The parity tests take their values from the folders that the environment names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from parity import golden, golden_methods

HERE = Path(__file__).parent


def _perturb(file: Path) -> None:
    """Values of results, which a test can only miss if it does not read them."""
    with np.load(file, allow_pickle=False) as old:
        values = dict(old)
    floats = {k: 1.5 * v + 0.1 for k, v in values.items() if v.dtype.kind == "f"}
    np.savez(file, **{**values, **floats})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "folder", "tests"),
    [
        ("STARSEG_GOLDEN_METHODS", golden_methods.FOLDER, ["test_methods_softmax.py", "test_methods_sigmoid.py"]),
        ("STARSEG_GOLDEN", golden.FOLDER, ["test_losses.py", "test_train_step.py"]),
    ],
)
def test_another_folder_is_read(variable: str, folder: Path, tests: list[str], tmp_path: Path) -> None:
    def run(values: Path) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(str(HERE / name) for name in tests),
        ]
        environment = {**os.environ, variable: str(values)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

    same, other = tmp_path / "same", tmp_path / "other"
    for copied in (same, other):
        shutil.copytree(folder, copied)
    for file in other.glob("*.npz"):
        _perturb(file)
    assert run(same).returncode == 0
    failed = run(other)
    assert failed.returncode == 1 and all(f"{name}::" in failed.stdout for name in tests), failed.stdout[-2000:]
    shutil.rmtree(other)
    assert run(other).returncode, "a folder that is not there cannot pass"
