"""Tables of a run's results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from starseg.engine.events import Listener, StepFinished

GROUPS = ("old", "new", "all", "harmonic")


def percent(value: float | None) -> str:
    """Format a percentage; "-" for None."""
    return "-" if value is None else f"{value:.1f}"


def kilobytes(size: int) -> str:
    """Format bytes as kilobytes; "-" for 0."""
    return f"{size / 1024:,.1f} KB" if size else "-"


def iou_table(results: Mapping[str, Any]) -> Group:
    """Tabulate the IoU of each class (rows) after each step (columns), followed by the means."""
    run, steps = results["run"], results["steps"]
    title = f"{run['method']}, {run['dataset']} {run['task']} {run['setting']}: IoU in percent after each step"
    table = Table()
    table.add_column("class")
    for entry in steps:
        table.add_column(f"step {entry['step']}", justify="right")
    for name in steps[-1]["iou"]:
        table.add_row(Text(name), *(percent(s["iou"][name]) if name in s["iou"] else "" for s in steps))
    table.add_section()
    for group in GROUPS:
        table.add_row(f"mean {group}", *(percent(s["miou"][group]) for s in steps))
    table.add_row("pixel accuracy", *(percent(s["pixel_accuracy"]["all"]) for s in steps))
    return Group(Text(title), table, *(Text(f"note: {note}") for note in run.get("notes", [])))


def print_results(console: Console) -> Listener:
    """A listener that prints the table of a run's results whenever a step is finished."""

    def show(event: StepFinished) -> None:
        console.print(iou_table(event.results))

    return show


def old_kept(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the old mIoU after the last step in percent of that after step 0; None for a single step."""
    first, last = steps[0]["miou"]["old"], steps[-1]["miou"]["old"]
    return 100 * last / first if len(steps) > 1 and first and last is not None else None


def comparison_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate the final old / new / all / harmonic mIoU of runs, and the share of step 0's old mIoU that is left."""
    table = Table(title="mIoU in percent after the last step; kept: of the old mIoU after step 0")
    exemplars = any(results["steps"][-1].get("exemplar_bytes") for results in runs.values())
    for column in ("run", *GROUPS, "kept", "bank", *(["exemplars"] if exemplars else []), "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, results in runs.items():
        last, left = results["steps"][-1], old_kept(results["steps"])
        kept = "-" if left is None else f"{left:.0f} %"
        figures = (percent(last["miou"][g]) for g in GROUPS)
        marked = f"{name} *" if results["run"].get("notes") else name
        stored = [kilobytes(last["bank_bytes"])]
        if exemplars:
            stored.append(kilobytes(last.get("exemplar_bytes", 0)))
        table.add_row(Text(marked), *figures, kept, *stored, f"{sum(s['seconds'] for s in results['steps']):.0f}")
    notes = {note for results in runs.values() for note in results["run"].get("notes", [])}
    table.caption = "\n".join(f"* {note}" for note in sorted(notes)) or None
    return table


def figures_table(title: str, figures: Mapping[str, Any]) -> Group:
    """Tabulate IoU per class and the means of one evaluation."""
    table = Table()
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, value in figures["iou"].items():
        table.add_row(Text(name), percent(value))
    table.add_section()
    for group, value in figures["miou"].items():
        table.add_row(f"mean {group}", percent(value))
    return Group(Text(title), table)
