"""Demo: STAR, constellation, fine-tuning and joint training on a small synthetic data set, without downloads."""

from __future__ import annotations

import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from starseg.config import parse_config
from starseg.data.shapes import write_shapes
from starseg.errors import UserError
from starseg.experiments.train import train
from starseg.report.page import write_report
from starseg.report.tables import comparison_table
from starseg.utils.files import read_json

METHODS = ("star", "constellation", "finetune", "joint")


def demo_settings() -> dict[str, Any]:
    """Read demo.yaml."""
    return yaml.safe_load(files("starseg.experiments").joinpath("demo.yaml").read_text())


def run_demo(out: Path, console: Console) -> dict[str, Path]:
    """Write the data, run the methods, print the comparison and draw the figures.

    Fine-tuning takes its step 0 from STAR, as both train it alike.

    Args:
        out: folder for ``data``, one run directory a method, and the pictures.
        console: where progress goes.

    Returns:
        The run directories by method.

    Raises:
        UserError: ``out`` holds something else.
    """
    # What is killed while it writes the data leaves something hidden.
    there = {entry.name for entry in out.iterdir() if not entry.name.startswith(".")} if out.is_dir() else set()
    if there and "data" not in there:
        raise UserError(f"--out {out}: holds something that `starseg demo` did not make; give a free place")
    start = time.monotonic()
    settings = demo_settings()
    data = write_shapes(out / "data", **settings.pop("shapes"))
    settings["data"]["root"] = str(data)
    runs = {}
    for method in METHODS:
        console.rule(method)
        adopted = {"start_from": str(out / "star" / "step_0")} if method == "finetune" else {}
        tree = {**settings, **adopted, "method": method, "out": str(out / method)}
        runs[method] = train(parse_config(tree, "demo"), console=console)
    console.rule("result")
    console.print(comparison_table({name: read_json(run / "results.json") for name, run in runs.items()}))
    write_report([runs["star"]], runs["star"], console)
    write_report(list(runs.values()), out, console)
    console.print(f"all done in {time.monotonic() - start:.0f} s; runs in {out}", highlight=False)
    return runs
