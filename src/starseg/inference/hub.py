"""Export of a step as a folder for a model hub: weights, model.json and a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starseg import __version__
from starseg.engine.checkpoint import is_finished, load_model
from starseg.errors import UserError
from starseg.inference.history import read_history
from starseg.report.templating import template
from starseg.utils.files import read_json, write_atomic

_FILES = ("model.safetensors", "model.json")
_CARD, _CARD_HEAD = "README.md", b"---\nlibrary_name: starseg\n"


def _earlier_steps(step_dir: Path, step: int) -> list[dict[str, Any]]:
    """Return the entries of the run's results.json up to this step, if the step lies in its run."""
    path = step_dir.resolve().parent / "results.json"
    return [e for e in read_json(path)["steps"] if e["step"] <= step] if path.is_file() else []


def is_export(folder: Path) -> bool:
    """Whether a folder was written by :func:`write_hub`, as its model card shows."""
    card = folder / _CARD
    return not is_finished(folder) and card.is_file() and card.read_bytes().startswith(_CARD_HEAD)


def _is_free(folder: Path) -> bool:
    """Whether the folder does not exist or holds an earlier export."""
    if is_export(folder) or not folder.exists():
        return True
    return folder.is_dir() and not any(folder.iterdir())


def write_hub(step_dir: Path, folder: Path) -> Path:
    """Write the weights, model.json and a README.md with the run's results.

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
    if not _is_free(folder):
        raise UserError(f"--hub: {folder} holds something that `starseg export` did not make; give a free place")
    model, info = load_model(step_dir)
    metrics = read_json(step_dir / "metrics.json")
    card = template("model_card.md.j2").render(
        info=info,
        classes=[(name, i) for i, name in info.predictable.items()],
        metrics=metrics,
        steps=_earlier_steps(step_dir, info.step),
        history=read_history(step_dir, info),
        parameters=sum(p.numel() for p in model.parameters()),
        mean=[round(x, 4) for x in model.mean.flatten().tolist()],
        std=[round(x, 4) for x in model.std.flatten().tolist()],
        version=__version__,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # The card first: a folder that has one may be written again after a break.
    write_atomic(folder / _CARD, card.encode(errors="backslashreplace"))
    for name in _FILES:
        write_atomic(folder / name, (step_dir / name).read_bytes())
    return folder / _CARD
