"""Tables of a run's results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def iou_table(results: Mapping[str, Any]) -> Group:
    """IoU per class (a row each) after every step (a column each), then the means."""
    run, steps = results["run"], results["steps"]
    title = f"{run['method']}, {run['dataset']} {run['task']} {run['setting']}: IoU in percent after each step"
    table = Table()
    table.add_column("class")
    for entry in steps:
        table.add_column(f"step {entry['step']}", justify="right")
    for name in steps[-1]["iou"]:
        table.add_row(name, *(percent(s["iou"][name]) if name in s["iou"] else "" for s in steps))
    table.add_section()
    for group in ("old", "new", "all", "harmonic"):
        table.add_row(f"mean {group}", *(percent(s["miou"][group]) for s in steps))
    table.add_row("pixel accuracy", *(percent(s["pixel_accuracy"]["all"]) for s in steps))
    return Group(Text(title), table, *(Text(f"note: {note}") for note in run.get("notes", [])))


def comparison_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Final old / new / all / harmonic mIoU of several runs, and how much of the old mIoU of step 0 is left."""
    table = Table(title="mIoU in percent after the last step")
    for column in ("method", "old", "new", "all", "harmonic", "old mIoU kept", "bank", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name, results in runs.items():
        first, last = results["steps"][0], results["steps"][-1]
        kept = f"{100 * last['miou']['old'] / first['miou']['old']:.0f} %" if len(results["steps"]) > 1 else "-"
        figures = (percent(last["miou"][g]) for g in ("old", "new", "all", "harmonic"))
        bank = f"{last['bank_bytes'] / 1024:.1f} KB" if last["bank_bytes"] else "-"
        marked = f"{name} *" if results["run"].get("notes") else name
        table.add_row(marked, *figures, kept, bank, f"{sum(s['seconds'] for s in results['steps']):.0f}")
    notes = {note for results in runs.values() for note in results["run"].get("notes", [])}
    table.caption = "\n".join(f"* {note}" for note in sorted(notes)) or None
    return table


def figures_table(title: str, figures: Mapping[str, Any]) -> Group:
    """IoU per class and the means of one evaluation."""
    table = Table()
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, value in figures["iou"].items():
        table.add_row(name, percent(value))
    table.add_section()
    for group, value in figures["miou"].items():
        table.add_row(f"mean {group}", percent(value))
    return Group(Text(title), table)
