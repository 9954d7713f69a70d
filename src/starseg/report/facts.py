"""Contents of a report page, gathered from a run's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from starseg.data.index import class_index
from starseg.engine.checkpoint import load_info, read_results
from starseg.engine.run_data import RunData
from starseg.errors import UserError
from starseg.report.tables import old_kept
from starseg.report.testset import finished_steps, run_data
from starseg.utils.files import read_json, read_text

_CURVE_POINTS = 200


@dataclass(frozen=True)
class Forgetting:
    """Forgetting of one class: its IoU in percent when learned, at its earlier best, and after the last step."""

    name: str
    learnt: int
    first: float
    best: float
    final: float

    @property
    def lost(self) -> float:
        """Best earlier IoU minus the final one."""
        return self.best - self.final


def forgetting(steps: Sequence[dict[str, Any]]) -> list[Forgetting]:
    """Return the forgetting of the classes known before the last step, largest first."""
    found = []
    for name, final in steps[-1]["iou"].items():
        earlier = [(s["step"], s["iou"][name]) for s in steps[:-1] if s["iou"].get(name) is not None]
        if earlier and final is not None:
            found.append(Forgetting(name, earlier[0][0], earlier[0][1], max(v for _, v in earlier), final))
    return sorted(found, key=lambda f: -f.lost)


@dataclass(frozen=True)
class Confusion:
    """Predictions for the pixels of a group of classes, in percent.

    Attributes:
        groups: (group, pixels, [right, background, another old class, another new class]); None where it cannot be.
        pairs: (class, mistaken for, percent of the class's pixels), the largest first.
    """

    groups: list[tuple[str, int, list[float | None]]]
    pairs: list[tuple[str, str, float]]


def confusion_groups(matrix: np.ndarray, names: Sequence[str], base: int, pairs: int = 8) -> Confusion:
    """Summarise a confusion matrix by old and new classes.

    Args:
        matrix: [1 + C, 1 + C] counts, rows the labels, columns the predictions.
        names: by training id, the background first.
        base: how many classes count as old.
        pairs: how many mistakes to list.
    """
    counts = np.asarray(matrix, np.float64)
    parts = {"background": slice(0, 1), "old classes": slice(1, 1 + base), "new classes": slice(1 + base, None)}
    wrong = counts - np.diag(np.diag(counts))
    groups: list[tuple[str, int, list[float | None]]] = []
    for group, rows in parts.items():
        total = counts[rows].sum()
        if not total:
            continue
        shares = [np.diag(counts)[rows].sum(), *(wrong[rows, columns].sum() for columns in parts.values())]
        percents: list[float | None] = [float(100 * s / total) for s in shares]
        if group == "background":
            percents[1] = None
        groups.append((group, int(total), percents))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nan_to_num(100 * wrong / counts.sum(1, keepdims=True))
    order = np.argsort(-share, axis=None)[:pairs]
    places = [np.unravel_index(i, share.shape) for i in order]
    return Confusion(groups, [(names[i], names[j], float(share[i, j])) for i, j in places if share[i, j] >= 1])


@dataclass(frozen=True)
class Storage:
    """Bytes stored for old classes, compared with the images and masks of the steps before the last.

    Attributes:
        bank: bytes of the method's state.
        exemplars, exemplar_bytes: old images kept.
        images, raw: how many images those steps had, and the bytes of their files; None where the data set is gone.
    """

    bank: int
    exemplars: int
    exemplar_bytes: int
    images: int | None = None
    raw: int | None = None

    @property
    def kept(self) -> int:
        """Bytes of the method's state and of the exemplars."""
        return self.bank + self.exemplar_bytes


def _storage(run: Path, results: dict[str, Any]) -> Storage:
    steps, last = results["steps"], results["steps"][-1]
    kept = Storage(last["bank_bytes"], last.get("exemplars", 0), last.get("exemplar_bytes", 0))
    try:
        config, _, dataset, task = run_data(run)
        pixels = class_index(dataset, dataset.train)
        data = RunData(dataset, task, pixels, pixels[:0], config)
        earlier = [data.positions(s["step"], "train") for s in steps[:-1]]
        if not earlier:
            return kept
        used = np.unique(np.concatenate(earlier))
        raw = sum(f.stat().st_size for i in used for f in (dataset.train.images[i], dataset.train.masks[i]))
    except (UserError, OSError):
        return kept
    return replace(kept, images=len(used), raw=raw)


def _logged(folder: Path, group: str) -> dict[str, list[tuple[float, float]]]:
    """Read the scalars ``group/name`` of a step's TensorBoard logs: name -> (iteration, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any(folder.glob("logs/events.*")):
        return {}
    events = EventAccumulator(str(folder / "logs")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith(f"{group}/")]
    return {
        tag.removeprefix(f"{group}/"): [(float(e.step), float(e.value)) for e in events.Scalars(tag)] for tag in tags
    }


def loss_curves(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Read the loss terms of a step: name -> (iteration, value), about 200 points at most."""
    curves = _logged(folder, "loss")
    return {name: points[:: -(-len(points) // _CURVE_POINTS)] for name, points in curves.items()}


def time_split(folder: Path) -> dict[str, float]:
    """Read the seconds spent in each part of a step, largest first."""
    seconds = {part: points[-1][1] for part, points in _logged(folder, "time").items()}
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Facts:
    """Facts about a run that the page shows.

    Attributes:
        name: of its directory.
        run, steps: see results.json.
        forgetting, confusion, storage: see their classes; confusion is None where metrics.json is gone.
        losses: step -> name -> points.
        times: step -> part -> seconds.
        kept: old mIoU after the last step in percent of that after step 0.
        config: config.yaml as text.
    """

    name: str
    run: dict[str, Any]
    steps: list[dict[str, Any]]
    forgetting: list[Forgetting]
    confusion: Confusion | None
    storage: Storage
    losses: dict[int, dict[str, list[tuple[float, float]]]]
    times: dict[int, dict[str, float]]
    kept: float | None
    config: str

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(step["seconds"] for step in self.steps)


def _confusion(run: Path) -> Confusion | None:
    try:
        last = finished_steps(run)[-1]
        info = load_info(last)
    except UserError:
        return None
    metrics = read_json(last / "metrics.json")
    matrix = np.array(metrics["confusion"])
    # Rows of classes that the masks do not label; those of absent classes are empty anyway.
    matrix[[metrics["iou"].get(name, 0.0) is None for name in info.names]] = 0
    return confusion_groups(matrix, info.names, info.base)


def shown_names(runs: Sequence[Path]) -> list[str]:
    """Return a distinct name for each run directory, with a note if steps are missing.

    Raises:
        UserError: no run among them.
    """
    places = [run.resolve() for run in runs]
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(set(places)):
        depth += 1
    names = ["/".join(place.parts[-depth:]) for place in places]
    for i, run in enumerate(runs):
        content = read_results(run)
        if (done := len(content["steps"])) < (total := content["run"]["steps"]):
            names[i] += f" ({done} of {total} steps)"
    return names


def gather(run: Path, name: str | None = None) -> Facts:
    """Read a run directory, shown under its own name or ``name``.

    Raises:
        UserError: no run, or one without a finished step.
    """
    results = read_results(run)
    steps = results["steps"]
    if not steps:
        raise UserError(f"{run}: no finished step in this run directory")
    return Facts(
        name=name or run.resolve().name,
        run=results["run"],
        steps=steps,
        forgetting=forgetting(steps),
        confusion=_confusion(run),
        storage=_storage(run, results),
        losses={s["step"]: curves for s in steps if (curves := loss_curves(run / f"step_{s['step']}"))},
        times={s["step"]: times for s in steps if (times := time_split(run / f"step_{s['step']}"))},
        kept=old_kept(steps),
        config=read_text(run / "config.yaml") if (run / "config.yaml").is_file() else "",
    )
