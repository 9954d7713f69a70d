"""A step as a folder that a model hub takes: weights, model.json and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starseg import __version__
from starseg.engine.checkpoint import load_model, read_json, write_atomic
from starseg.errors import UserError
from starseg.report.templating import template

_FILES = ("model.safetensors", "model.json")


def _earlier_steps(step_dir: Path, step: int) -> list[dict[str, Any]]:
    """Entries of the run's results.json up to this step, where the step lies in its run."""
    path = step_dir.resolve().parent / "results.json"
    return [e for e in read_json(path)["steps"] if e["step"] <= step] if path.is_file() else []


def write_hub(step_dir: Path, folder: Path) -> Path:
    """Write the weights, model.json and a README.md made from the run's figures.

    Args:
        step_dir: a finished step.
        folder: made if missing; ``starseg predict`` takes it like a step directory.

    Returns:
        The model card.

    Raises:
        UserError: the step is damaged or not finished, or the folder is the step's own or holds something else.
    """
    if folder.resolve() == step_dir.resolve():
        raise UserError(f"--hub: {folder} is the step itself; give another folder")
    if folder.exists() and not (folder.is_dir() and ((folder / _FILES[1]).is_file() or not any(folder.iterdir()))):
        raise UserError(f"--hub: {folder} holds something that `starseg export` did not make; give a free place")
    model, info = load_model(step_dir)
    metrics = read_json(step_dir / "metrics.json")
    card = template("model_card.md.j2").render(
        info=info,
        classes=zip(info.names, info.dataset_ids, strict=True),
        metrics=metrics,
        steps=_earlier_steps(step_dir, info.step),
        parameters=sum(p.numel() for p in model.parameters()),
        mean=[round(x, 4) for x in model.mean.flatten().tolist()],
        std=[round(x, 4) for x in model.std.flatten().tolist()],
        version=__version__,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        write_atomic(folder / name, (step_dir / name).read_bytes())
    write_atomic(folder / "README.md", card.encode())
    return folder / "README.md"
