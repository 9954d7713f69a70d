"""The parity tests take their values from the folders that the environment names."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from parity import golden, golden_methods
from parity.test_model import generated, published
from starseg.models import Architecture, make_network
from starseg.ops.bilinear import resize

HERE = Path(__file__).parent


def _perturb(file: Path) -> None:
    """Values of results, which a test can only miss if it does not read them."""
    with np.load(file, allow_pickle=False) as old:
        values = dict(old)
    floats = {k: 1.5 * v + 0.1 for k, v in values.items() if v.dtype.kind == "f"}
    np.savez(file, **{**values, **floats})


def _run(tests: list[str], variable: str, folder: Path) -> subprocess.CompletedProcess:
    files = [str(HERE / name) for name in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, variable: str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "folder", "tests"),
    [
        ("STARSEG_GOLDEN_METHODS", golden_methods.FOLDER, ["test_methods_softmax.py", "test_methods_sigmoid.py"]),
        ("STARSEG_GOLDEN", golden.FOLDER, ["test_losses.py", "test_train_step.py"]),
    ],
)
def test_the_folder_named_by_the_environment_is_read(
    variable: str, folder: Path, tests: list[str], tmp_path: Path
) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    for copied in (same, other):
        shutil.copytree(folder, copied)
    for file in other.glob("*.npz"):
        _perturb(file)
    assert _run(tests, variable, same).returncode == 0
    failed = _run(tests, variable, other)
    assert failed.returncode == 1 and all(f"{name}::" in failed.stdout for name in tests), failed.stdout[-2000:]
    shutil.rmtree(other)
    assert _run(tests, variable, other).returncode, "a folder that is not there cannot pass"


@pytest.mark.slow
def test_a_checkpoint_may_have_other_heads(tmp_path: Path) -> None:
    """Three heads, as in no published task; the expected outputs are computed here."""
    sizes, salt = [10, 1, 3], "other"
    network = make_network(Architecture("resnet101"), sizes).eval()
    keys = []
    for name, tensor in published(network.state_dict()).items():
        value = generated(name, list(tensor.shape), salt)
        tensor.copy_(torch.from_numpy(value))
        digest = hashlib.sha256(value.tobytes()).hexdigest()[:16]
        keys.append({"name": name, "shape": list(tensor.shape), "sha256_16": digest})
    parameters = sum(p.numel() for p in network.parameters())
    content = {"salt": salt, "classes": sizes, "n_parameters": parameters, "keys": keys}
    (tmp_path / "state_dict_keys.json").write_text(json.dumps(content))
    shutil.copy(golden.FOLDER / "model_layer_stats.json", tmp_path)
    image = golden.tensors("model_io", "in0/")["image"]
    with torch.inference_mode():
        logits = resize(network(image).logits, image.shape[-2:])
    np.savez(tmp_path / "model_io.npz", **{"in0/image": image.numpy(), "in0/logits": logits.numpy()})
    done = _run(["test_checkpoint.py"], "STARSEG_GOLDEN", tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
