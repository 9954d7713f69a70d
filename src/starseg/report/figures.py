"""Figures of runs: predictions after each step, and IoU per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from starseg.data.palette import paint, voc_palette
from starseg.engine.checkpoint import read_results
from starseg.errors import UserError
from starseg.report.testset import open_test_set

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_IMAGES = 6


@dataclass(frozen=True)
class Gallery:
    """Test images with the predictions of a run's steps.

    Attributes:
        names: by training id of the last step.
        images: [M, 3, H, W] uint8.
        truth: [M, H, W] uint8 training ids.
        predictions: label of a column -> [M, H, W] uint8 training ids.
    """

    names: tuple[str, ...]
    images: Tensor
    truth: Tensor
    predictions: dict[str, Tensor]


def _spread(pixels: np.ndarray, new: Sequence[int], old: Sequence[int], count: int) -> np.ndarray:
    """Choose images for each class in turn, preferring large areas and old and new classes together."""
    share = np.sqrt(pixels[:, [*new, *old]] / pixels.sum(1, keepdims=True))
    both = (pixels[:, list(new)] > 0).any(1) & (pixels[:, list(old)] > 0).any(1)
    chosen: list[int] = []
    for i in range(count):
        score = share[:, i % share.shape[1]] * (1 + both)
        score[chosen] = -1
        chosen.append(int(score.argmax()))
    return np.array(chosen)


def gallery(run: Path, count: int = _IMAGES, last_only: bool = False) -> Gallery:
    """Predict a few test images with the models of a run's finished steps.

    Raises:
        UserError: no finished step, or the data set is not where the run's configuration says.
    """
    test = open_test_set(run)
    task, positions = test.task, test.positions
    order = task.seen(test.last)
    new, old = order[task.base :] or order, order[: task.base]
    best = _spread(test.pixels[positions], new, old, min(count, len(positions)))
    images, truth = test.samples(positions[best])
    folders = test.folders[-1:] if last_only else test.folders
    predictions = {folder.name.replace("_", " "): test.predict(folder, images) for folder in folders}
    return Gallery(task.class_names(test.last), images, truth, predictions)


def draw_gallery(shown: Gallery, path: Path) -> Path:
    """Write a grid with one row per image (columns: image, ground truth, predictions) and a legend of the classes."""
    columns = ["image", "truth", *shown.predictions]
    rows = len(shown.images)
    size = (1.7 * len(columns), 1.7 * rows + 0.8)
    figure, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False, layout="constrained")
    for i in range(rows):
        cells = [
            shown.images[i].permute(1, 2, 0).numpy(),
            paint(shown.truth[i].numpy()),
            *(paint(p[i].numpy()) for p in shown.predictions.values()),
        ]
        for axis, cell in zip(axes[i], cells, strict=True):
            axis.imshow(cell, interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    colours = voc_palette() / 255
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[i % 256]) for i in range(1, len(shown.names))]
    figure.legend(handles, shown.names[1:], loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _heat_map(axis: Any, title: str, steps: Sequence[dict[str, Any]]) -> None:
    names = list(steps[-1]["iou"])
    values = np.full((len(names), len(steps)), np.nan)
    for j, step in enumerate(steps):
        for i, name in enumerate(names):
            value = step["iou"].get(name)
            values[i, j] = np.nan if value is None else value
    axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axis.text(
                j,
                i,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value < 60 else "black",
            )
    axis.set_xticks(range(len(steps)), [f"step {s['step']}" for s in steps], fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_title(title, fontsize=9)


def draw_iou(results: dict[str, dict[str, Any]], path: Path) -> Path:
    """Write mIoU of old (solid) and of all classes (dashed) per step, and IoU per class and step of each run."""
    classes = max(len(r["steps"][-1]["iou"]) for r in results.values())
    size = (4.2 + 2.6 * len(results), max(3.2, 0.26 * classes + 1))
    figure, axes = plt.subplots(
        1,
        1 + len(results),
        figsize=size,
        width_ratios=[1.6, *[1] * len(results)],
        squeeze=False,
        layout="constrained",
    )
    curve = axes[0][0]
    for i, (name, result) in enumerate(results.items()):
        steps = [s["step"] for s in result["steps"]]
        for group, style in (("old", "-"), ("all", "--")):
            values = [s["miou"][group] for s in result["steps"]]
            curve.plot(steps, values, style, marker="o", ms=4, color=f"C{i}", label=f"{name}, {group}")
        _heat_map(axes[0][1 + i], f"{name}: IoU per class", result["steps"])
    curve.set(xlabel="step", ylabel="mIoU in percent", ylim=(0, 100))
    curve.xaxis.get_major_locator().set_params(integer=True)
    curve.grid(alpha=0.3)
    curve.legend(fontsize=7, handlelength=3)
    curve.set_title("base classes and all classes", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _side_by_side(runs: Sequence[Path]) -> Gallery:
    """Combine all steps of one run, or the last step of each of several runs."""
    if len(runs) == 1:
        return gallery(runs[0])
    galleries = {run.name: gallery(run, last_only=True) for run in runs}
    first = next(iter(galleries.values()))
    same = {n: g for n, g in galleries.items() if torch.equal(g.images, first.images)}
    predictions = {n: p for n, g in same.items() for p in g.predictions.values()}
    return Gallery(first.names, first.images, first.truth, predictions)


def write_figures(runs: Sequence[Path], out: Path, console: Console) -> None:
    """Write ``iou.png`` and ``pictures.png`` of one or several runs, and print their paths.

    With one run the pictures show every step, with several each run's last step; without the data set there are none.

    Raises:
        UserError: a folder that is no run.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = {run.name: read_results(run) for run in runs}
    paths = [draw_iou(results, out / "iou.png")]
    try:
        paths.append(draw_gallery(_side_by_side(runs), out / "pictures.png"))
    except UserError as error:
        console.print(f"pictures.png left out: {error}", highlight=False, soft_wrap=True)
    for path in paths:
        console.print(f"picture: {path}", highlight=False, soft_wrap=True)
