"""Commands of the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from starseg import __version__
from starseg.cli.arguments import ConfigFile, JsonFile, Overrides, parse_numbers
from starseg.cli.data import app as data_app
from starseg.cli.exchange import adopt, export
from starseg.cli.help import complete_methods, examples, show_method, show_methods
from starseg.cli.tasks import tasks
from starseg.errors import UserError
from starseg.utils.terminal import make_console, reporting_errors, resumable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Teach a segmentation model new classes without the old images (STAR).",
    epilog=examples("starseg"),
)
console = make_console()

Out = Annotated[Path | None, typer.Option("--out", help="Run directory.", show_default=False)]


def _steps(text: str | None) -> range | None:
    """Parse a step ("2") or a range of steps ("0-2")."""
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        raise UserError(f"--steps: expected a step or a range such as 0-2, got {text!r}")
    return range(int(first), int(last or first) + 1)


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"starseg {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(  # noqa: D103 (its docstring would replace the program's help)
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None: ...


@app.command(epilog=examples("train"))
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[str | None, typer.Option(help="Only these steps, e.g. 1 or 0-2.", show_default=False)] = None,
    devices: Annotated[int | None, typer.Option(help="Processes on each node.", show_default=False)] = None,
    num_nodes: Annotated[int | None, typer.Option(help="Nodes.", show_default=False)] = None,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Repeatable on a GPU too.")] = False,
    out: Out = None,
) -> None:
    """Run a task sequence: train, evaluate and publish each step; finished steps are skipped."""
    from starseg.config import load_config
    from starseg.engine.launch import is_leader
    from starseg.experiments.train import train as run
    from starseg.report.page import write_report
    from starseg.utils.overrides import override

    options = {"out": out and str(out), "train.devices": devices, "train.num_nodes": num_nodes}
    options["train.deterministic"] = deterministic or None
    changed = [*(overrides or []), *(override(key, value) for key, value in options.items() if value is not None)]
    with resumable():
        run_dir = run(load_config(config, changed), _steps(steps), console)
    if is_leader():
        write_report([run_dir], run_dir, console)


@app.command(epilog=examples("learn"))
def learn(
    images: Annotated[Path, typer.Option("--images", help="Folder of photos.", show_default=False)],
    masks: Annotated[
        Path,
        typer.Option(
            "--masks", help="Folder of masks of the same names (PNG, Labelme), or a COCO file.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Run directory.", show_default=False)],
    step_dir: Annotated[
        Path | None, typer.Argument(help="The step_<t> directory to continue from.", show_default=False)
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="File (a class a line, background first, or with values; YAML; CVAT's labelmap.txt) or names; by "
            "default COCO's categories.",
            show_default=False,
        ),
    ] = None,
    no_background: Annotated[
        bool, typer.Option("--no-background", help="The masks have none: value 0 is the first name.")
    ] = False,
    ignore: Annotated[
        list[int] | None,
        typer.Option(help="Value of ignored pixels, besides 255; may be repeated.", show_default=False),
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Train a first step instead.")] = False,
    backbone: Annotated[str | None, typer.Option(help="With --new: a timm model.", show_default=False)] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="With --new: yes (ImageNet), no, or a file.", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="See `starseg methods`; by default constellation (constellation-extend on an adopted network), or "
            "star to continue from another method's step.",
            autocompletion=complete_methods,
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="By default from the images.", show_default=False)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.", show_default=False)] = None,
    crop: Annotated[int | None, typer.Option(min=32, help="With --new: pixels.", show_default=False)] = None,
    val_share: Annotated[float, typer.Option(help="Share of the images kept for validation.")] = 0.15,
    seed: Annotated[int, typer.Option(min=0, help="Of training and the validation split.")] = 0,
    photos: Annotated[
        str | None,
        typer.Option(help="Adopted network: unlabelled photos that show its own classes.", show_default=False),
    ] = None,
    part_of: Annotated[
        str | None,
        typer.Option(help="Adopted network: the class that the new ones were part of.", show_default=False),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Adopted network: calibrate the old logits as well.")
    ] = False,
    replace: Annotated[
        str | None,
        typer.Option(help="Adopted network: the old class that is learnt again.", show_default=False),
    ] = None,
    tune_copy: Annotated[
        bool, typer.Option("--tune-copy", help="Adopted network: train a copy of it to describe the new classes.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; train nothing.")] = False,
) -> None:
    """Teach a model the classes of a folder of photos and masks, in one more step (docs/learn.md)."""
    from starseg.finetuning.run import LearnRequest
    from starseg.finetuning.run import learn as run
    from starseg.methods import METHODS

    if new == (step_dir is not None):
        raise UserError("learn: give a step directory to continue from, or --new for a first step")
    if step_dir and (backbone or pretrained):
        raise UserError(f"--backbone, --pretrained: only with --new; the network is that of {step_dir}")
    if method and method not in METHODS:
        raise UserError(f"--method: expected one of {', '.join(sorted(METHODS))}, got {method!r}")
    known = {"yes": True, "no": False, None: None}
    weights = known[pretrained] if pretrained in known else Path(str(pretrained))
    options = (method, backbone, weights, crop, epochs, lr, val_share, seed, not no_background, tuple(ignore or []))
    with resumable():
        request = LearnRequest(
            step_dir, images, masks, classes, out, *options, photos, part_of, refine, replace, tune_copy
        )
        run(request, console, dry_run)


app.command(epilog=examples("adopt"))(adopt)


@app.command(name="eval", epilog=examples("eval"))
def evaluate(
    weights: Annotated[
        Path, typer.Argument(help="A run's step_<t> directory, or a published checkpoint (.pth).", show_default=False)
    ],
    overrides: Overrides = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate a trained step on the test split of its data set: IoU per class and means."""
    from starseg.engine.evaluate import evaluate_model, open_weights
    from starseg.report.tables import figures_table
    from starseg.utils.files import write_json

    figures = evaluate_model(*open_weights(weights, overrides or []), console)
    console.print(figures_table(str(weights), figures))
    if json_file:
        write_json(json_file, figures)


@app.command(epilog=examples("predict"))
def predict(
    step_dir: Annotated[
        Path, typer.Argument(help="A run's step_<t> directory, or a published checkpoint (.pth).", show_default=False)
    ],
    images: Annotated[list[str], typer.Argument(help="Files, folders, quoted patterns.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder for the masks.", show_default=False)],
    overlays: Annotated[bool, typer.Option("--overlays", help="Also draw tinted images with a legend.")] = False,
    json_file: JsonFile = None,
    window: Annotated[bool, typer.Option("--window", help="Slide crops over the full-size image.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirrored image.")] = False,
    scales: Annotated[str, typer.Option(help="Average over these sizes, e.g. 0.75,1,1.25.")] = "1",
    batch_size: Annotated[int, typer.Option(help="Images of a forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    precision: Annotated[str, typer.Option(help="32, bf16, or auto: bf16 where the hardware is fast at it.")] = "auto",
) -> None:
    """Predict masks of images as palette PNGs in the data set's ids; exit code 1 if an image could not be read.

    By default an image is resized so that its short side is the training
    crop's, and the logits are brought back to its size. The --json file
    takes each image's share of each class.
    """
    from starseg.inference.files import predict_files
    from starseg.inference.predictor import Options, load

    options = Options(window, flip, parse_numbers("--scales", scales), batch_size)
    if predict_files(load(step_dir, device, precision), images, out, console, options, overlays, json_file):
        raise typer.Exit(1)


app.command(epilog=examples("export"))(export)


@app.command(name="app", epilog=examples("app"))
def serve(
    run: Annotated[Path, typer.Argument(help="A run directory, or one step_<t> of it.", show_default=False)],
    other: Annotated[
        Path | None, typer.Option("--compare", help="Another run, shown next to it.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one.")] = 7860,
) -> None:
    """Serve a local page: drop an image and see the prediction of each step."""
    from starseg.inference.app import serve

    serve([run, other] if other else [run], port, console)


@app.command(epilog=examples("report"))
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, side by side.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="A page (report.html), or a folder for it and pictures.")] = Path(
        "report"
    ),
) -> None:
    """Report one or several runs: tables, figures and a self-contained HTML page."""
    from starseg.engine.checkpoint import read_results
    from starseg.report.facts import shown_names
    from starseg.report.page import refuse_target, write_report
    from starseg.report.tables import comparison_table, iou_table

    refuse_target(out)
    results = dict(zip(shown_names(runs), map(read_results, runs), strict=True))
    for result in results.values():
        console.print(iou_table(result))
    if len(runs) > 1:
        console.print(comparison_table(results))
    write_report(runs, out, console)


@app.command(epilog=examples("compare"))
def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated, see `starseg methods`.", autocompletion=complete_methods)
    ] = "star,finetune,joint",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and tables.")] = Path("runs/compare"),
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2,...",
            help="Tune each method over these values on held-out training images first; may be repeated.",
            show_default=False,
        ),
    ] = None,
    shortlist: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --sweep: tune later steps only from the N best settings of step 0.", show_default=False
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs trained at the same time, each in its own process.")] = 1,
    ceilings: Annotated[
        bool, typer.Option("--ceilings/--no-ceilings", help="Add joint training on the same frozen network.")
    ] = True,
) -> None:
    """Train several methods and seeds in the same way and compare them; a later call adds methods or seeds."""
    from starseg.engine.launch import is_leader
    from starseg.experiments.compare import add_ceilings, make_plan, write_comparison
    from starseg.experiments.plan import run_plan
    from starseg.experiments.sweep import make_sweep
    from starseg.experiments.tuning import run_sweep

    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise UserError(f"--seeds: expected numbers such as 0,1,2, got {seeds!r}")
    if shortlist and not sweep:
        raise UserError("--shortlist: tunes with the values of --sweep, which is missing")
    names, numbers = [m.strip() for m in methods.split(",")], [int(s) for s in seeds.split(",")]
    if sweep:
        tuning = make_sweep(config, names, numbers, out, overrides or [], sweep, shortlist)
        with resumable():
            failed = run_sweep(tuning, console, ceilings, jobs)
    else:
        plan = make_plan(config, names, numbers, out, overrides or [])
        if ceilings:
            add_ceilings(plan)
        with resumable():
            failed = run_plan(plan, console, jobs)
        if is_leader():
            write_comparison(out, console)
    if failed:
        raise typer.Exit(1)


@app.command(epilog=examples("demo"))
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for data, runs and pictures.")] = Path("runs/demo"),
) -> None:
    """Run STAR, constellation, fine-tuning and joint training on a small synthetic data set; no downloads."""
    from starseg.experiments.demo import run_demo

    with resumable():
        run_demo(out, console)


@app.command(epilog=examples("bench"))
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Small and once: whether it runs, not how fast.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Benchmark time and memory of training and evaluation against a dense reference."""
    from starseg.bench.suite import bench as run
    from starseg.utils.files import write_json

    found = run(console, quick)
    if json_file:
        write_json(json_file, found)


@app.command(epilog=examples("methods"))
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Of one of them.", autocompletion=complete_methods, show_default=False)
    ] = None,
) -> None:
    """List the methods that a configuration can name; with a NAME, show one in detail."""
    if name:
        show_method(name, console)
    else:
        show_methods(console)


app.command(epilog=examples("tasks"))(tasks)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point."""
    with reporting_errors("--debug" in sys.argv):
        app(standalone_mode=True)
