"""Comparison of methods under equal conditions: one configuration, several methods and seeds, one table."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from starseg.config import RunConfig, change_config, load_config
from starseg.engine.rundir import FREE_KEYS, differences
from starseg.engine.setup import check_method, resolve_config
from starseg.errors import UserError
from starseg.experiments.plan import Plan
from starseg.methods import METHODS
from starseg.report.facts import forgetting
from starseg.report.page import SweepTable, write_page
from starseg.utils.files import read_json, write_atomic
from starseg.utils.overrides import override

GROUPS = ("old", "new", "all", "harmonic")
STORED = ("network bytes", "bank bytes", "image bytes")
CEILING, SHARE = "ceiling", "% of ceiling"
COLUMNS = (*GROUPS, "forgetting", "plasticity", CEILING, SHARE, "parameters", "seconds a step", *STORED)
SWEEP = "sweep"
"""Name of the folder of tuning runs in a comparison with a sweep (:mod:`starseg.experiments.sweep`)."""
Runs = Mapping[str, Sequence[Path]]
"""Finished runs by method."""
_TABLES = (("seeds", *GROUPS), ("forgetting", "plasticity", CEILING, SHARE), COLUMNS[-2 - len(STORED) :])
"""Columns of the tables on the terminal, which is too narrow for all of them at once."""
_DECIMALS = dict.fromkeys((*GROUPS, "forgetting", "plasticity", CEILING, SHARE, "seconds a step"), 1)


def run_name(method: str, seed: int) -> str:
    """Return the folder name of a run in a comparison."""
    return f"{method}_seed{seed}"


def make_plan(config: Path, methods: Sequence[str], seeds: Sequence[int], out: Path, overrides: Iterable[str]) -> Plan:
    """Configure every run, so that all mistakes are found before training starts.

    Methods whose first step (:attr:`Method.base_step`) and its hyper-parameters are the same take it from one run.

    Raises:
        UserError: a method that does not exist, or a configuration that is refused.
    """
    check_method_names(methods)
    if (out / SWEEP).exists():
        raise UserError(f"{out} holds a comparison with --sweep; give another folder with --out")
    plan = Plan([], set(), out)

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
            lender = owners.get(owner) or configured(owner, seed)
            if not lends(lender, own) or owner == method:
                owners.setdefault(method, own)
                plan.runs.append(own)
                continue
            if owner not in owners:
                owners[owner] = lender
                plan.runs.append(lender)
                plan.only_base.add(lender.run_dir)
            plan.runs.append(configured(method, seed, override("start_from", str(lender.run_dir / "step_0"))))
    refuse_other_conditions(sorted(out.glob("*_seed*/config.yaml")), plan.runs[0], out)
    return plan


def add_ceilings(plan: Plan) -> None:
    """Add the upper bound of every run whose method freezes its network after step 0.

    It learns all classes at once with the encoder and decoder of the run's step 0, in the run's folder ``ceiling``.
    """
    for run in plan.runs:
        if METHODS[run.method].freezes and run.run_dir not in plan.only_base and not run.task.at_once:
            network, place = run.model.frozen_from or run.run_dir / "step_0", run.run_dir / CEILING
            changes = [override("model.frozen_from", str(network)), override("out", str(place)), "start_from=null"]
            plan.ceilings.append(change_config(run, [*changes, "task.at_once=true"]))


def check_method_names(methods: Sequence[str]) -> None:
    """Check that the methods to compare are registered.

    Raises:
        UserError: one of them is not.
    """
    if unknown := [m for m in methods if m not in METHODS]:
        raise UserError(f"--methods: unknown {', '.join(unknown)}; known: {', '.join(sorted(METHODS))}")


def _conditions(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all runs of a comparison share."""
    alike = {section: config.get(section) for section in ("data", "task", "model", "compat", "eval")}
    return alike | {
        "train": {key: config.get("train", {}).get(key) for key in ("batch_size", "accumulate", "precision")}
    }


def refuse_other_conditions(earlier: Iterable[Path], config: RunConfig, out: Path) -> None:
    """Check that a run has the settings that all runs of a comparison must share.

    Args:
        earlier: config.yaml of the runs that the comparison holds already.
        config: configuration of the run.
        out: the folder of the comparison.

    Raises:
        UserError: an earlier run has other settings.
    """
    ours = _conditions(config.model_dump(mode="json", by_alias=True))
    for path in earlier:
        theirs = _conditions(load_config(path).model_dump(mode="json", by_alias=True))
        if changed := differences(theirs, ours, FREE_KEYS):
            raise UserError(
                f"{out} holds a comparison under other conditions ({path.parent.name}):\n  "
                + "\n  ".join(changed)
                + "\n"
                "Give another folder with --out"
            )


def lends(lender: RunConfig, borrower: RunConfig) -> bool:
    """Return whether two runs train step 0 with the same settings; not if the lender has no recipe for the data set."""
    first = _first_step(borrower)
    try:
        return _first_step(lender) == first
    except UserError:
        return False


def _first_step(config: RunConfig) -> tuple[Any, ...]:
    """Return the settings besides the method that determine the training of step 0."""
    resolved, method = resolve_config(config)
    options = resolved.method_section(method.section)
    train = resolved.train
    alike = (train.base, train.warmup, train.weight_decay, train.encoder_lr)
    return *alike, options.get("pos_weight"), options.get("mbce", 1.0)


def figures(run: Path) -> dict[str, Any]:
    """Return one run's metrics in percent, seconds per later step, and bytes; None where a metric does not apply."""
    results = read_json(run / "results.json")
    steps, background = results["steps"], results["run"].get("background", True)
    last, later = steps[-1], steps[1:]
    lost = [f.lost for f in forgetting(steps) if not background or f.name != next(iter(last["iou"]))]
    learnt = [s["iou"][name] for s in later for name in s["new_classes"] if s["iou"][name] is not None]
    ceiling = _ceiling(run)
    return {
        **{group: last["miou"][group] for group in GROUPS},
        "forgetting": statistics.mean(lost) if lost else None,
        "plasticity": statistics.mean(learnt) if learnt else None,
        CEILING: ceiling,
        SHARE: 100 * last["miou"]["all"] / ceiling if ceiling else None,
        "parameters": last.get("trainable_parameters"),
        "seconds a step": statistics.mean(s["seconds"] for s in later or steps),
        "network bytes": last.get("network_bytes"),
        "bank bytes": last["bank_bytes"],
        "image bytes": last.get("exemplar_bytes", 0),
    }


def _ceiling(run: Path) -> float | None:
    """Return the mIoU of all classes learnt at once on the run's frozen network; None if there is no such run."""
    path = run / CEILING / "results.json"
    steps = read_json(path)["steps"] if path.is_file() else []
    return steps[-1]["miou"]["all"] if steps else None


def finished_runs(runs: Iterable[Path]) -> Runs:
    """Return those of the given runs by method of which all steps are finished."""
    found: dict[str, list[Path]] = {}
    for folder in runs:
        content = read_json(folder / "results.json") if (folder / "results.json").is_file() else {"steps": []}
        if (steps := content["steps"]) and len(steps) == content["run"]["steps"]:
            found.setdefault(content["run"]["method"], []).append(folder)
    return found


def summary(finished: Runs) -> list[dict[str, str]]:
    """Return one row per method: the mean over seeds, with the standard deviation if there are several."""
    rows = []
    for method, runs in finished.items():
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


def curves(finished: Runs) -> list[dict[str, Any]]:
    """Return the mIoU after every step of every run."""
    return [
        {"method": method, "run": run.name, "step": step["step"], **step["miou"]}
        for method, runs in finished.items()
        for run in runs
        for step in read_json(run / "results.json")["steps"]
    ]


def footnotes(finished: Runs) -> list[str]:
    """Return the footnotes that a star next to a method's name refers to."""
    runs = (run for each in finished.values() for run in each)
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


def write_comparison(
    out: Path, console: Console, runs: Iterable[Path] | None = None, sweep: SweepTable | None = None
) -> None:
    """Print the table of all finished runs; write compare.{md,tex,csv}, curves.csv and report.html.

    Args:
        out: the folder of the comparison.
        console: where the table is printed.
        runs: the runs to compare, finished or not; by default all in ``out``.
        sweep: the sweep by which the settings of the runs were chosen.

    Raises:
        UserError: there is no finished run.
    """
    finished = finished_runs(sorted(out.glob("*_seed*")) if runs is None else runs)
    rows = summary(finished)
    if not rows:
        raise UserError(f"{out}: holds no finished run of a comparison")
    for columns in _TABLES:
        table_rows = [{"method": row["method"]} | {column: row[column] for column in columns} for row in rows]
        print_rows(table_rows, "after the last step: mean over seeds, mIoU in percent", console)
    notes = footnotes(finished)
    for note in notes:
        console.print(f"* {note}", highlight=False)
    text = markdown(rows) + "".join(f"\n\\* {note}\n" for note in notes)
    files = {
        "compare.md": text + (f"\n{sweep.caption}\n\n{markdown(sweep.rows)}" if sweep else ""),
        "compare.tex": latex(rows),
        "compare.csv": comma_separated(rows),
        "curves.csv": comma_separated(curves(finished)),
    }
    for name, content in files.items():
        write_atomic(out / name, content.encode(errors="backslashreplace"))
    console.print(f"tables: {', '.join(str(out / name) for name in files)}", highlight=False, soft_wrap=True)
    write_page([run for each in finished.values() for run in each], out / "report.html", console, rows, sweep)


def print_rows(rows: Sequence[dict[str, str]], title: str, console: Console) -> None:
    """Print a table whose first column is text."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
