"""Access to the golden folder: $STARSEG_GOLDEN, by default the copy under tests/data/golden.

Everything is discovered from the files, so that a folder with other cases, sizes and class counts serves as well.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(os.environ.get("STARSEG_GOLDEN") or Path(__file__).parents[1] / "data" / "golden")


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def document(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def cases(name: str, prefix: str = "", depth: int = 1) -> list[str]:
    """Distinct first ``depth`` components of the array names below ``prefix``."""
    names = [n.removeprefix(prefix) for n in arrays(name) if n.startswith(prefix) and "/" in n.removeprefix(prefix)]
    return sorted({"/".join(n.split("/")[:depth]) for n in names})


def tensors(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays(name).items() if k.startswith(prefix)}


def check_close(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Largest difference at most ``relative`` of the expected array's largest absolute value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).abs().max()
    scale = expected.double().abs().max()
    assert difference <= relative * scale, f"differs by {difference:.3e}, largest value {scale:.3e}"
