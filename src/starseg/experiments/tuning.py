"""Comparison of methods at their best settings: each is tuned on held-out training images, then compared as usual."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from starseg.config import RunConfig
from starseg.engine.launch import is_leader
from starseg.errors import UserError
from starseg.experiments.compare import add_ceilings, comma_separated, finished_runs, print_rows, write_comparison
from starseg.experiments.plan import Plan, run_plan, train_runs
from starseg.experiments.sweep import Point, Sweep, affects_step_0, later_steps, text_of
from starseg.report.page import SweepTable
from starseg.utils.files import read_json, write_atomic
from starseg.utils.terminal import labelled

_TITLE = "mIoU of all classes on held-out training images in percent"


@dataclass(frozen=True)
class Tuned:
    """Result of the tuning.

    Attributes:
        best: the chosen grid point of each method that has one.
        rows: table of all grid points, one row each; of those that were not shortlisted, one row per setting of step 0.
        runs: all runs of the tuning.
        failed: methods of which every grid point failed.
    """

    best: Mapping[str, Point]
    rows: Sequence[dict[str, str]]
    runs: Sequence[RunConfig]
    failed: Sequence[str]


@dataclass(frozen=True)
class FirstStep:
    """A setting of step 0, trained by one run.

    Attributes:
        run: the run that trains it.
        points: the grid points of a method that start from it.
        score: mIoU after step 0 in percent; None if the run failed.
    """

    run: RunConfig
    points: Sequence[Point]
    score: float | None = None


def run_sweep(sweep: Sweep, console: Console, ceilings: bool = True, jobs: int = 1) -> list[str]:
    """Tune the methods, train each with its best setting, and write the tables; finished runs are not repeated.

    Args:
        sweep: the grid points and the two stages of their runs.
        console: where progress and tables are printed.
        ceilings: whether the final runs include the upper bounds of methods that freeze their network.
        jobs: how many runs are trained at the same time.

    Returns:
        The names of methods without a finished grid point, and of final runs that failed.

    Raises:
        UserError: no method has a finished grid point, or all final runs failed.
    """
    out, tuned = sweep.final.out, tune(sweep, console, jobs)
    if is_leader():
        print_rows(tuned.rows, f"tuning: {_TITLE}", console)
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "sweep.csv", comma_separated(tuned.rows).encode())
    if not tuned.best:
        raise UserError("no grid point of any method finished; the reasons are listed above")
    plan = sweep.final.plan(tuned.best.values(), sweep.seeds)
    if ceilings:
        add_ceilings(plan)
    failed = run_plan(plan, console, jobs)
    if is_leader():
        caption = (
            "Each method has the setting with the highest mIoU of all classes after the last step, trained with seed "
            f"{sweep.seeds[0]} and evaluated on {sweep.share:.0%} of the training images, which were held out."
            f"{_shortlist_note(sweep)} Training and evaluation of the finished steps took "
            f"{_seconds(tuned.runs):,.0f} s in the tuning and {_seconds(plan.runs):,.0f} s in the final runs."
        )
        console.print(caption, highlight=False)
        runs = [run.run_dir for run in plan.runs if run.run_dir not in plan.only_base and plan.name(run) not in failed]
        write_comparison(out, console, runs, SweepTable(caption, tuned.rows))
    return [*tuned.failed, *failed]


def tune(sweep: Sweep, console: Console, jobs: int = 1) -> Tuned:
    """Train the grid points of methods that have several, and choose the best of each method.

    Of equal points, the first is chosen. A failing point is reported and left out. With :attr:`Sweep.shortlist`, step 0
    is trained with all its settings before, and only the points that start from the best ones are trained.
    """
    seed, tuning = sweep.seeds[0], sweep.tuning
    first = train_first_steps(sweep, console, jobs) if sweep.shortlist else {}
    kept = {method: _shortlist(points, first.get(method), sweep.shortlist) for method, points in sweep.points.items()}
    plan = tuning.plan([point for points in kept.values() if len(points) > 1 for point in points], [seed])
    failed = {tuning.out / name for name in train_runs(plan, console, jobs)}
    best, rows, lost = {}, [], []
    for method, points in kept.items():
        places = [tuning.run_dir(point, seed) for point in points]
        scores = [None if place in failed else _score(place) for place in places]
        known = [score for score in scores if score is not None]
        if known or len(points) == 1:
            best[method] = points[scores.index(max(known)) if known else 0]
        else:
            lost.append(method)
            console.print(labelled("failed:", "red", f"{method}: no grid point finished"))
        start = {point.name: each.score for each in first.get(method, []) for point in each.points}
        for each in first.get(method, []):
            if not any(point in points for point in each.points):
                rows.append(_row(sweep, each.points[0], each.run, each.score))
        for point, place, score in zip(points, places, scores, strict=True):
            row = _row(sweep, point, None, start.get(point.name))
            row["validation mIoU"] = "-" if len(points) == 1 else _percent(score)
            row["seconds"] = _whole(_seconds(run for run in plan.runs if run.run_dir == place))
            rows.append(row | {"chosen": "yes" if point is best.get(method) else ""})
    trained = {run.run_dir: run for run in (*(each.run for some in first.values() for each in some), *plan.runs)}
    return Tuned(best, rows, list(trained.values()), lost)


def train_first_steps(sweep: Sweep, console: Console, jobs: int = 1) -> dict[str, list[FirstStep]]:
    """Train step 0 with all its settings, of methods that have several and later steps; print a table of the results.

    Returns:
        The settings of step 0 by method.
    """
    seed, tuning = sweep.seeds[0], sweep.tuning
    found: dict[str, list[FirstStep]] = {}
    for method, points in sweep.points.items():
        if not later_steps(tuning.configure(points[0], seed)):
            continue
        runs: dict[Path, FirstStep] = {}
        for point in points:
            run = tuning.base_step(point, seed)
            before = runs.get(run.run_dir, FirstStep(run, []))
            runs[run.run_dir] = replace(before, points=[*before.points, point])
        if len(runs) > 1:
            found[method] = list(runs.values())
    trained = {each.run.run_dir: each.run for some in found.values() for each in some}
    plan = Plan(list(trained.values()), set(trained), tuning.out)
    failed = {tuning.out / name for name in train_runs(plan, console, jobs)}
    found = {
        method: [replace(each, score=None if each.run.run_dir in failed else _last(each.run.run_dir)) for each in some]
        for method, some in found.items()
    }
    rows = [_row(sweep, each.points[0], each.run, each.score) for some in found.values() for each in some]
    if rows and is_leader():
        shown = [key for key in rows[0] if key not in ("validation mIoU", "chosen")]
        print_rows([{key: row[key] for key in shown} for row in rows], f"tuning of step 0: {_TITLE}", console)
    return found


def _shortlist(points: Sequence[Point], first: Sequence[FirstStep] | None, size: int | None) -> list[Point]:
    """Return the points that start from one of the ``size`` best settings of step 0; all if there is one setting."""
    if first is None:
        return list(points)
    finished = sorted((each for each in first if each.score is not None), key=lambda each: -(each.score or 0.0))
    return [point for point in points if any(point in each.points for each in finished[:size])]


def _shortlist_note(sweep: Sweep) -> str:
    if sweep.shortlist is None:
        return ""
    settings = "setting" if sweep.shortlist == 1 else f"{sweep.shortlist} settings"
    return f" Later steps were tuned only from the {settings} of step 0 with the highest mIoU after step 0."


def _row(sweep: Sweep, point: Point, base: RunConfig | None, start: float | None) -> dict[str, str]:
    """Return a row of the table of grid points.

    Args:
        sweep: the sweep.
        point: the grid point.
        base: the run of step 0 if the row stands for all points that start from it.
        start: mIoU after step 0.
    """
    shown = {k: v for k, v in point.setting.items() if base is None or affects_step_0(k, base.method)}
    return (
        {"method": point.method}
        | {key: text_of(shown[key]) if key in shown else "-" for key in sweep.keys}
        | ({"step 0 mIoU": "-" if start is None and base is None else _percent(start)} if sweep.shortlist else {})
        | {"validation mIoU": "-", "seconds": _whole(_seconds([base] if base else [])), "chosen": ""}
    )


def _percent(score: float | None) -> str:
    return "failed" if score is None else f"{score:.2f}"


def _whole(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds else "-"


def _score(run: Path) -> float | None:
    """Return the mIoU of all classes after the last step in percent; None if the run is not finished."""
    return _last(run) if finished_runs([run]) else None


def _last(run: Path) -> float | None:
    """Return the mIoU of all classes after the last finished step in percent."""
    score: float | None = read_json(run / "results.json")["steps"][-1]["miou"]["all"]
    return score


def _seconds(runs: Iterable[RunConfig]) -> float:
    """Add up the seconds of all finished steps, without those copied from another run."""
    total = 0.0
    for run in runs:
        results = run.run_dir / "results.json"
        steps = read_json(results)["steps"] if results.is_file() else []
        total += sum(step["seconds"] for step in steps[1 if run.start_from else 0 :])
    return total
