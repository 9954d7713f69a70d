"""Metrics from a confusion matrix (docs/reference/star.md, "Evaluation")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _harmonic(a: float | None, b: float | None) -> float | None:
    if a is None or b is None:
        return None
    return 2 * a * b / (a + b) if a + b else 0.0


_MEANS = ("miou", "miou_foreground", "class_accuracy", "pixel_accuracy")


def summarize_parts(parts: Sequence[np.ndarray], names: Sequence[str], base: int, **options: Any) -> dict[str, Any]:
    """Compute the metrics of a step from the confusion matrices of its test images.

    Args:
        parts: one matrix; or in the setting "domain" two, of the domains of step 0 and of later steps. The metrics of
            these are then "old" and "new" in the result, as all classes are in both.
        names: class names by training id, the background first.
        base: number of classes that count as old.
        **options: keyword arguments of :func:`summarize`.
    """
    scores = summarize(np.sum(parts, axis=0), names, base, **options)
    if len(parts) == 1:
        return scores
    old, new = (summarize(part, names, base, **options) for part in parts)
    for key in _MEANS:
        figures = {"old": old[key]["all"], "new": new[key]["all"], "all": scores[key]["all"]}
        scores[key] = {**figures, "harmonic": _harmonic(figures["old"], figures["new"])}
    return scores


def summarize(
    confusion: np.ndarray,
    names: Sequence[str],
    base: int,
    *,
    iou_epsilon: float = 0.0,
    absent_as_zero: bool = False,
    background: bool = True,
    unscored: np.ndarray | None = None,
) -> dict[str, Any]:
    """Compute IoU and accuracies in percent; a class without pixels is None and left out of the means.

    Args:
        confusion: [1 + C, 1 + C] pixel counts, rows are labels, columns predictions.
        names: class names by training id, the background first.
        base: number of classes that count as old, in addition to the background; all others are new.
        iou_epsilon: added to the intersection in the IoU's denominator.
        absent_as_zero: whether absent classes count as 0 in the means.
        background: whether id 0 is scored; without a background, it only stands for pixels that are not labelled.
        unscored: [1 + C] bool, classes without IoU and accuracy, whose rows only count against other classes.

    Returns:
        {"iou": {name: percent}, "accuracy": {name: percent}, and "miou", "miou_foreground" (without id 0: the
        background, or "other" of ADE20K), "class_accuracy", "pixel_accuracy", each
        {"old", "new", "all", "harmonic"}}.
    """
    matrix = np.asarray(confusion, np.float64)
    hit, rows, columns = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = hit / rows * 100
        iou = hit / (rows + columns - hit - iou_epsilon) * 100
    if unscored is not None:
        accuracy[unscored], iou[unscored], rows = np.nan, np.nan, np.where(unscored, 0, rows)
    scored = 0 if background else 1
    groups = {"old": slice(scored, 1 + base), "new": slice(1 + base, None), "all": slice(scored, None)}

    def means(values: np.ndarray, first: int = 0) -> dict[str, float | None]:
        filled = np.nan_to_num(values) if absent_as_zero else values
        figures = {g: _mean(filled[max(first, s.start or 0) : s.stop]) for g, s in groups.items()}
        return {**figures, "harmonic": _harmonic(figures["old"], figures["new"])}

    def pixels() -> dict[str, float | None]:
        figures = {g: 100 * hit[s].sum() / rows[s].sum() if rows[s].sum() else None for g, s in groups.items()}
        total = rows[scored:].sum()
        figures["all"] = 100 * hit[scored:].sum() / total if total else None
        figures = {g: None if v is None else float(v) for g, v in figures.items()}
        return {**figures, "harmonic": _harmonic(figures["old"], figures["new"])}

    def by_name(values: np.ndarray) -> dict[str, float | None]:
        return {n: None if np.isnan(v) else float(v) for n, v in [*zip(names, values, strict=True)][scored:]}

    return {
        "iou": by_name(iou),
        "accuracy": by_name(accuracy),
        "miou": means(iou),
        "miou_foreground": means(iou, first=1),
        "class_accuracy": means(accuracy),
        "pixel_accuracy": pixels(),
    }
