"""The command line: commands only, the work is done elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from starseg import __version__
from starseg.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Teach a segmentation model new classes without the old images (STAR).",
)
console = Console()

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration, see configs/.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.base.epochs=5", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory.", show_default=False)]


def _in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the work whose result it is to hold."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json {path}: expected a file in a folder that exists; give another one")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write what was found here.", callback=_in_a_folder, show_default=False),
]


def _steps(text: str | None) -> range | None:
    """ "2" or "0-2" as a range."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        raise UserError(f"--steps: expected a step or a range such as 0-2, got {text!r}")
    return range(int(first), int(last or first) + 1)


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C ends with exit code 130 and says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; finished steps are kept, the same command goes on after them")
        raise typer.Exit(130) from None


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"starseg {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None: ...


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[str | None, typer.Option(help="Only these steps, e.g. 1 or 0-2.", show_default=False)] = None,
    devices: Annotated[int | None, typer.Option(help="Processes on each node.", show_default=False)] = None,
    num_nodes: Annotated[int | None, typer.Option(help="Nodes.", show_default=False)] = None,
    out: Out = None,
) -> None:
    """Run a task sequence: train, evaluate and publish each step; finished steps are skipped."""
    from starseg.config import load_config
    from starseg.engine.launch import is_leader
    from starseg.engine.runner import train as run
    from starseg.report.figures import write_figures

    options = {"out": out and json.dumps(str(out)), "train.devices": devices, "train.num_nodes": num_nodes}
    changed = [*(overrides or []), *(f"{key}={value}" for key, value in options.items() if value is not None)]
    with _resumable():
        run_dir = run(load_config(config, changed), _steps(steps), console)
    if is_leader():
        write_figures([run_dir], run_dir, console)


@app.command(name="eval")
def evaluate(
    weights: Annotated[
        Path, typer.Argument(help="A run's step_<t> directory, or a published checkpoint (.pth).", show_default=False)
    ],
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """IoU per class and means of a trained step, on the test split of its data set."""
    from starseg.config import change_config, load_config
    from starseg.engine.checkpoint import load_model, write_json
    from starseg.engine.evaluate import evaluate_model
    from starseg.report.tables import figures_table

    if weights.suffix == ".pth":
        from torch.cuda import is_available

        from starseg.compat.settings import parse_published, published_tree
        from starseg.compat.weights import load_checkpoint

        tree, source = published_tree(None, weights)
        published = parse_published(tree, str(source))
        config = change_config(published.to_run(gpu=is_available()), overrides or [])
        model, info = load_checkpoint(weights, published)
    else:
        config = load_config(weights.resolve().parent / "config.yaml", overrides or [])
        model, info = load_model(weights)
    figures = evaluate_model(model, info, config, console)
    console.print(figures_table(str(weights), figures))
    if json_file:
        write_json(json_file, figures)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, side by side.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("report"),
) -> None:
    """Tables and pictures of one or several runs."""
    from starseg.engine.checkpoint import read_json
    from starseg.report.figures import write_figures
    from starseg.report.tables import comparison_table, iou_table

    results = {run.name: read_json(run / "results.json") for run in runs}
    for result in results.values():
        console.print(iou_table(result))
    if len(runs) > 1:
        console.print(comparison_table(results))
    write_figures(runs, out, console)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for data, runs and pictures.")] = Path("runs/demo"),
) -> None:
    """STAR, fine-tuning and joint training on a small drawn data set: a few minutes on a CPU, nothing to download."""
    from starseg.demo import run_demo

    with _resumable():
        run_demo(out, console)


@app.command()
def methods() -> None:
    """The methods a configuration can name."""
    from rich.table import Table

    from starseg.methods import METHODS

    table = Table("method", "what it does", "source", "keeps from step to step")
    for name, method in sorted(METHODS.items()):
        table.add_row(f"[bold]{name}[/]", method.summary, method.source, method.stores)
    console.print(table)


data_app = typer.Typer(no_args_is_help=True, help="Look at a data set.")
app.add_typer(data_app, name="data")


@data_app.command()
def index(config: ConfigFile, overrides: Overrides = None) -> None:
    """Scan the class index (or take it from the cache) and list the images of each step."""
    from starseg.config import load_config
    from starseg.engine.data import open_data
    from starseg.methods import METHODS, method_options

    settings = load_config(config, overrides or [])
    method = METHODS[settings.method](method_options(settings.method, settings))
    data = open_data(settings, method, console)
    for step in range(len(data.task)):
        names = data.task.list_names(data.task.new(step))
        counts = len(data.positions(step, "train")), len(data.positions(step, "test"))
        console.print(f"step {step}: {counts[0]} training, {counts[1]} test images: {names}", highlight=False)


@data_app.command()
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Read every image and mask, list every broken file, count classes.

    Exit code 0: usable; 1: a file is broken; 2: another layout, or a task that cannot be trained on it.
    """
    from starseg.config import load_config
    from starseg.data.check import check_data, print_report
    from starseg.engine.checkpoint import write_json

    report = check_data(load_config(config, overrides or []), console)
    print_report(report, console)
    if json_file:
        write_json(json_file, report.as_data())
    if report.broken or report.task_problem:
        raise typer.Exit(1 if report.broken else 2)


@contextmanager
def reporting_errors(debug: bool) -> Iterator[None]:
    """A user's mistake is one message and exit code 2; with ``debug`` also a traceback."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        Console(stderr=True).print("[bold red]error:[/]", Text(str(error)), highlight=False, soft_wrap=True)
        sys.exit(2)


def main() -> None:
    """Entry point."""
    with reporting_errors("--debug" in sys.argv):
        app(standalone_mode=True)
