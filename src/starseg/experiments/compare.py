"""Comparison of methods under equal conditions: one configuration, several methods and seeds, one table."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from starseg.config import RunConfig, load_config
from starseg.engine.rundir import FREE_KEYS, differences
from starseg.engine.setup import check_method, resolve_config
from starseg.errors import UserError
from starseg.experiments.train import train
from starseg.methods import METHODS
from starseg.report.facts import forgetting
from starseg.report.page import write_page
from starseg.utils.files import read_json, write_atomic
from starseg.utils.overrides import override
from starseg.utils.terminal import labelled

GROUPS = ("old", "new", "all", "harmonic")
COLUMNS = (*GROUPS, "forgetting", "plasticity", "parameters", "seconds a step", "stored bytes")
_DECIMALS = dict.fromkeys((*GROUPS, "forgetting", "plasticity", "seconds a step"), 1)


@dataclass(frozen=True)
class Plan:
    """Runs of a comparison.

    Attributes:
        runs: one configuration per method and seed, those that train a shared base step first.
        only_base: directories of runs of which step 0 is all that is needed.
    """

    runs: list[RunConfig]
    only_base: set[Path]


def run_name(method: str, seed: int) -> str:
    """Return the folder name of a run in a comparison."""
    return f"{method}_seed{seed}"


def make_plan(config: Path, methods: Sequence[str], seeds: Sequence[int], out: Path, overrides: Iterable[str]) -> Plan:
    """Configure every run, so that all mistakes are found before training starts.

    Methods whose first step (:attr:`Method.base_step`) and its hyper-parameters are the same take it from one run.

    Raises:
        UserError: a method that does not exist, or a configuration that is refused.
    """
    if unknown := [m for m in methods if m not in METHODS]:
        raise UserError(f"--methods: unknown {', '.join(unknown)}; known: {', '.join(sorted(METHODS))}")
    plan = Plan([], set())

    def configured(method: str, seed: int, *more: str) -> RunConfig:
        place = out / run_name(method, seed)
        found = load_config(
            config, [*overrides, f"method={method}", f"seed={seed}", override("out", str(place)), *more]
        )
        check_method(found)
        return found

    for seed in seeds:
        owners: dict[str, RunConfig] = {}
        # Owners first, so that their step 0 is there when the others want it.
        for method in sorted(dict.fromkeys(methods), key=lambda m: METHODS[m].base_step != m):
            owner, own = METHODS[method].base_step, configured(method, seed)
            first, lender = _first_step(own), owners.get(owner) or configured(owner, seed)
            if owner == method or not _lends(lender, first):
                owners.setdefault(method, own)
                plan.runs.append(own)
                continue
            if owner not in owners:
                owners[owner] = lender
                plan.runs.append(lender)
                plan.only_base.add(lender.run_dir)
            plan.runs.append(configured(method, seed, override("start_from", str(lender.run_dir / "step_0"))))
    _refuse_other_conditions(out, plan.runs[0])
    return plan


def _conditions(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all runs of a comparison share."""
    alike = {section: config.get(section) for section in ("data", "task", "model", "compat", "eval")}
    return alike | {
        "train": {key: config.get("train", {}).get(key) for key in ("batch_size", "accumulate", "precision")}
    }


def _refuse_other_conditions(out: Path, config: RunConfig) -> None:
    ours = _conditions(config.model_dump(mode="json", by_alias=True))
    for path in sorted(out.glob("*_seed*/config.yaml")):
        theirs = _conditions(load_config(path).model_dump(mode="json", by_alias=True))
        if changed := differences(theirs, ours, FREE_KEYS):
            raise UserError(
                f"{out} holds a comparison under other conditions ({path.parent.name}):\n  "
                + "\n  ".join(changed)
                + "\n"
                "Give another folder with --out"
            )


def _lends(lender: RunConfig, first: tuple[Any, ...]) -> bool:
    """Return whether a run trains step 0 with these settings; not if its method has no recipe for the data set."""
    try:
        return _first_step(lender) == first
    except UserError:
        return False


def _first_step(config: RunConfig) -> tuple[Any, ...]:
    """Return the settings besides the method that determine the training of step 0."""
    resolved, method = resolve_config(config)
    options = resolved.method_section(method.section)
    return resolved.train.base, resolved.train.warmup, options.get("pos_weight"), options.get("mbce", 1.0)


def run_plan(plan: Plan, console: Console) -> list[str]:
    """Train the unfinished runs, resuming interrupted ones; a failing run does not stop the others.

    Returns:
        The names of runs that failed.

    Raises:
        UserError: all of them did.
    """
    failed: list[str] = []
    for config in plan.runs:
        console.rule(config.run_dir.name)
        try:
            train(config, range(1) if config.run_dir in plan.only_base else None, console)
        except UserError as error:
            failed.append(config.run_dir.name)
            if len(failed) == len(plan.runs):
                raise
            console.print(labelled("failed:", "red", f"{config.run_dir.name}: {error}"), soft_wrap=True)
    return failed


def figures(run: Path) -> dict[str, Any]:
    """Return one run's metrics in percent, seconds per later step, and bytes; None where a metric does not apply."""
    steps = read_json(run / "results.json")["steps"]
    last, later = steps[-1], steps[1:]
    lost = [f.lost for f in forgetting(steps) if f.name != next(iter(last["iou"]))]
    learnt = [s["iou"][name] for s in later for name in s["new_classes"] if s["iou"][name] is not None]
    return {
        **{group: last["miou"][group] for group in GROUPS},
        "forgetting": statistics.mean(lost) if lost else None,
        "plasticity": statistics.mean(learnt) if learnt else None,
        "parameters": last.get("trainable_parameters"),
        "seconds a step": statistics.mean(s["seconds"] for s in later or steps),
        "stored bytes": last["bank_bytes"] + last.get("exemplar_bytes", 0),
    }


def finished_runs(out: Path) -> dict[str, list[Path]]:
    """Return the finished runs below ``out`` by method, in the order of seeds, without those needed only for step 0."""
    found: dict[str, list[Path]] = {}
    for results in sorted(out.glob("*_seed*/results.json")):
        content = read_json(results)
        run, steps = content["run"], content["steps"]
        if steps and len(steps) == run["steps"]:
            found.setdefault(run["method"], []).append(results.parent)
    return found


def summary(out: Path) -> list[dict[str, str]]:
    """Return one row per method: the mean over seeds, with the standard deviation if there are several."""
    rows = []
    for method, runs in finished_runs(out).items():
        row = {"method": method, "seeds": str(len(runs))}
        each = [figures(run) for run in runs]
        notes = any(read_json(run / "results.json")["run"].get("notes") for run in runs)
        row["method"] += " *" if notes else ""
        for column in COLUMNS:
            values = [f[column] for f in each if f[column] is not None]
            row[column] = _mean(values, _DECIMALS.get(column, 0)) if values else "-"
        rows.append(row)
    return sorted(rows, key=lambda r: -float(r["all"].split()[0]) if r["all"] != "-" else 1)


def _mean(values: Sequence[float], decimals: int) -> str:
    spread = f" ± {statistics.stdev(values):,.{decimals}f}" if len(values) > 1 and decimals else ""
    return f"{statistics.mean(values):.{decimals}f}{spread}"


def curves(out: Path) -> list[dict[str, Any]]:
    """Return the mIoU after every step of every run."""
    return [
        {"method": method, "run": run.name, "step": step["step"], **step["miou"]}
        for method, runs in finished_runs(out).items()
        for run in runs
        for step in read_json(run / "results.json")["steps"]
    ]


def footnotes(out: Path) -> list[str]:
    """Return the footnotes that a star next to a method's name refers to."""
    runs = (run for each in finished_runs(out).values() for run in each)
    return list(dict.fromkeys(note for run in runs for note in read_json(run / "results.json")["run"].get("notes", [])))


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Format a table in GitHub's Markdown."""
    heads = list(rows[0])
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(rows: Sequence[dict[str, str]]) -> str:
    """Format a table in LaTeX with booktabs."""
    heads = list(rows[0])
    body = [" & ".join(heads), *(" & ".join(row.values()) for row in rows)]
    lines = [line.replace("±", r"$\pm$").replace("%", r"\%").replace("_", r"\_") + r" \\" for line in body]
    columns = "l" + "r" * (len(heads) - 1)
    inner = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
    return f"\\begin{{tabular}}{{{columns}}}\n{inner}\n\\end{{tabular}}\n"


def comma_separated(rows: Sequence[dict[str, Any]]) -> str:
    """Format a table as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_comparison(out: Path, console: Console) -> None:
    """Print the table of all finished runs below ``out``; write compare.{md,tex,csv}, curves.csv and report.html.

    Raises:
        UserError: there is no finished run.
    """
    rows = summary(out)
    if not rows:
        raise UserError(f"{out}: holds no finished run of a comparison")
    for columns in (("seeds", *GROUPS), COLUMNS[len(GROUPS) :]):  # all at once are too wide for a terminal
        table = Table(title="after the last step, mIoU in percent, mean over seeds")
        for column in ("method", *columns):
            table.add_column(column, justify="left" if column == "method" else "right")
        for row in rows:
            table.add_row(row["method"], *(row[column] for column in columns))
        console.print(table)
    notes = footnotes(out)
    for note in notes:
        console.print(f"* {note}", highlight=False)
    files = {
        "compare.md": markdown(rows) + "".join(f"\n\\* {note}\n" for note in notes),
        "compare.tex": latex(rows),
        "compare.csv": comma_separated(rows),
        "curves.csv": comma_separated(curves(out)),
    }
    for name, text in files.items():
        write_atomic(out / name, text.encode(errors="backslashreplace"))
    console.print(f"tables: {', '.join(str(out / name) for name in files)}", highlight=False, soft_wrap=True)
    write_page([run for runs in finished_runs(out).values() for run in runs], out / "report.html", console, rows)
