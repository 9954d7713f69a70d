"""Report of one or several runs as one self-contained HTML file."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from markupsafe import Markup
from rich.console import Console

from starseg import __version__
from starseg.errors import UserError
from starseg.report.cases import Pictures, pictures
from starseg.report.facts import Facts, gather, shown_names
from starseg.report.figures import write_figures
from starseg.report.svg import COLOURS, Line, line_chart
from starseg.report.templating import template
from starseg.utils.files import write_atomic

PAGE = "report.html"
# What a folder holds that a report may be written into: an earlier page, or a run; or, where making the page was broken
# off, pictures alone.
_OURS, _PICTURES = {PAGE, "results.json"}, {"iou.png", "pictures.png"}
_PAGES = (".html", ".htm")
GROUPS = ("old", "new", "all")


@dataclass(frozen=True)
class Chart:
    """Chart with the (name, CSS class) pairs of its legend."""

    svg: Markup
    legend: list[tuple[str, str]]


@dataclass(frozen=True)
class RunPage:
    """Values that the template shows of a run; ``missing`` says why there are no pictures."""

    facts: Facts
    curves: Chart | None
    losses: dict[int, Chart]
    pictures: Pictures | None
    missing: str


@dataclass(frozen=True)
class SweepTable:
    """Grid points of a hyper-parameter sweep.

    Attributes:
        caption: how they were evaluated, and the time that the sweep took.
        rows: one row per grid point, column by column.
    """

    caption: str
    rows: Sequence[dict[str, str]]


def _points(facts: Facts, group: str) -> list[tuple[float, float]]:
    return [(s["step"], s["miou"][group]) for s in facts.steps if s["miou"][group] is not None]


def _chart(lines: Sequence[Line], title: str, x: str, y: str, top: float | None = None) -> Chart | None:
    shown = [line for line in lines if line.points]
    if not shown:
        return None
    legend = [(line.name, line.style) for line in shown if "muted" not in line.style]
    return Chart(line_chart(shown, title, x, y, top), legend)


def _class_curves(facts: Facts) -> Chart | None:
    """Chart the means per step over thin lines of the classes."""
    lines = []
    for name in facts.steps[-1]["iou"]:
        values = [(s["step"], s["iou"][name]) for s in facts.steps if s["iou"].get(name) is not None]
        lines.append(Line(name, values, "muted"))
    lines += [Line(f"mean {g}", _points(facts, g), f"s{i}") for i, g in enumerate(GROUPS)]
    if len(facts.steps) < 2:
        return None
    return _chart(lines, f"{facts.name}: IoU in percent after each step", "step", "IoU, %", 100)


def _loss_charts(facts: Facts) -> dict[int, Chart]:
    charts = {}
    for step, curves in facts.losses.items():
        lines = [Line(name, points, f"s{i % COLOURS}") for i, (name, points) in enumerate(curves.items())]
        if chart := _chart(lines, f"{facts.name}, step {step}: loss terms", "iteration", "loss"):
            charts[step] = chart
    return charts


def _comparison(runs: Sequence[Facts], group: str) -> Chart | None:
    lines = [Line(f.name, _points(f, group), f"s{i % COLOURS}") for i, f in enumerate(runs)]
    return _chart(lines, f"mIoU of {group} classes after each step, by run", "step", "mIoU, %", 100)


def _run_page(run: Path, name: str) -> RunPage:
    facts, drawn, missing = gather(run, name), None, ""
    try:
        drawn = pictures(run, [f.name for f in facts.forgetting])
    except UserError as error:
        missing = str(error)
    return RunPage(facts, _class_curves(facts), _loss_charts(facts), drawn, missing)


def render_page(
    runs: Sequence[Path], summary: Sequence[Mapping[str, str]] = (), sweep: SweepTable | None = None
) -> str:
    """Render the page of one or several run directories.

    Args:
        runs: directories.
        summary: rows of a table over them all, column by column (:func:`starseg.experiments.compare.summary`).
        sweep: the sweep by which the settings of the runs were chosen.

    Raises:
        UserError: a folder that is no run. A data set that is gone only leaves the pictures out.
    """
    pages = [_run_page(run, name) for run, name in zip(runs, shown_names(runs), strict=True)]
    facts = [page.facts for page in pages]
    environment = {
        "starseg": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    comparison = {g: chart for g in ("old", "all") if (chart := _comparison(facts, g))} if len(runs) > 1 else {}
    return template("report.html.j2").render(
        pages=pages,
        comparison=comparison,
        summary=summary,
        sweep=sweep,
        environment=environment,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def write_page(
    runs: Sequence[Path],
    path: Path,
    console: Console,
    summary: Sequence[Mapping[str, str]] = (),
    sweep: SweepTable | None = None,
) -> None:
    """Write the result of :func:`render_page` to ``path`` and print the path.

    Raises:
        UserError: a folder that is no run.
    """
    html = render_page(runs, summary, sweep)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, html.encode(errors="backslashreplace"))
    console.print(f"report: {path} ({len(html) / 1000:,.0f} KB)", highlight=False, soft_wrap=True)


def refuse_target(out: Path) -> None:
    """Check the target of a report before the report is made.

    Raises:
        UserError: a file that is no page, or a folder of somebody's that holds no earlier report.
    """
    if out.suffix.lower() in _PAGES and not out.is_dir():
        return
    if not out.is_dir() and (out.suffix or out.exists()):
        raise UserError(
            f"--out {out}: expected a page that ends in .html, or a folder, whose name has no dot if it is new"
        )
    there = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
    if there - _PICTURES and not there & _OURS:
        raise UserError(f"--out {out}: holds something, but no earlier report; give a free place")


def write_report(runs: Sequence[Path], out: Path, console: Console) -> None:
    """Write the page to ``out`` if that ends in .html, else pictures and :data:`PAGE` into the folder ``out``.

    Raises:
        UserError: a folder that is no run.
    """
    if out.suffix.lower() in _PAGES:
        write_page(runs, out, console)
        return
    write_figures(runs, out, console)
    write_page(runs, out / PAGE, console)
