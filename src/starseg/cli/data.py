"""The commands `starseg data index` and `starseg data check`."""

from __future__ import annotations

import typer

from starseg.cli.arguments import ConfigFile, JsonFile, Overrides
from starseg.cli.help import examples
from starseg.utils.terminal import make_console

app = typer.Typer(no_args_is_help=True, help="Look at a data set.")
console = make_console()


@app.command(epilog=examples("index"))
def index(config: ConfigFile, overrides: Overrides = None) -> None:
    """Scan the class index (or take it from the cache) and list the images of each step."""
    from starseg.config import load_config
    from starseg.engine.run_data import open_data
    from starseg.engine.setup import make_method

    settings = load_config(config, overrides or [])
    data = open_data(settings, make_method(settings), console)
    for step in range(len(data.task)):
        names = data.task.list_names(data.task.new(step))
        counts = len(data.positions(step, "train")), len(data.positions(step, "test"))
        console.print(f"step {step}: {counts[0]} training, {counts[1]} test images: {names}", highlight=False)


@app.command(epilog=examples("check"))
def check(config: ConfigFile, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Read every image and mask, list broken files, count classes.

    Exit code 0: usable; 1: a file is broken; 2: another layout, or a task that cannot be trained on it.
    """
    from starseg.config import load_config
    from starseg.report.data_check import check_data, print_report
    from starseg.utils.files import write_json

    report = check_data(load_config(config, overrides or []), console)
    print_report(report, console)
    if json_file:
        write_json(json_file, report.as_data())
    if report.broken or report.task_problem:
        raise typer.Exit(1 if report.broken else 2)
