"""The commands `starseg adopt` and `starseg export`: networks from other libraries, and for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starseg.cli.arguments import parse_numbers
from starseg.errors import UserError
from starseg.utils.terminal import make_console

console = make_console()


def adopt(
    source: Annotated[
        str,
        typer.Argument(
            help="torchvision:NAME, smp:CLASS[:ENCODER], model:NAME, hub:OWNER/NAME, or a folder of save_pretrained.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Run directory.", show_default=False)],
    weights: Annotated[
        str | None, typer.Option(help="File of weights, or torchvision's name of them.", show_default=False)
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Names of the outputs with commas between them, background first.", show_default=False),
    ] = None,
    no_background: Annotated[bool, typer.Option("--no-background", help="The first output is a class.")] = False,
    classifier: Annotated[
        str | None, typer.Option(help="Name of the last convolution, if it is another one.", show_default=False)
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Of pixels in 0..1, e.g. 0.5,0.5,0.5.", show_default=False)] = None,
    std: Annotated[str | None, typer.Option(help="Likewise.", show_default=False)] = None,
    crop: Annotated[
        int | None, typer.Option(min=32, help="Short side in pixels of predicted images.", show_default=False)
    ] = None,
    photos: Annotated[
        str | None,
        typer.Option(help="Unlabelled photos, from which STAR's prototypes are measured.", show_default=False),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="model:NAME: a layer that becomes a further map.", show_default=False)
    ] = None,
    multiple: Annotated[
        int | None, typer.Option(min=1, help="model:NAME: divisor of the sides of images.", show_default=False)
    ] = None,
    bgr: Annotated[bool, typer.Option("--bgr", help="The network takes BGR images.")] = False,
) -> None:
    """Make a step directory of a network that another library trained (docs/adopt.md).

    model:NAME is a network of your own, which a Python file named by
    STARSEG_MODELS registers. Predictions are compared with those of the
    original.
    """
    from starseg.adoption.adopt import AdoptRequest
    from starseg.adoption.adopt import adopt as run

    normalisation = (mean and parse_numbers("--mean", mean), std and parse_numbers("--std", std))
    run(
        AdoptRequest(
            *(source, out, weights, classes, not no_background, classifier, *normalisation, crop, photos),  # type: ignore[arg-type]
            *(features, multiple, bgr),
        ),
        console,
    )


def export(
    step_dir: Annotated[Path, typer.Argument(help="A run's step_<t> directory.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write ONNX, or what --to names, here.", show_default=False)
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="torchvision, smp, transformers or model: the form of the library that the network was adopted from; "
            "program: a torch.export file (.pt2).",
            show_default=False,
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the convolutions of the ONNX file.")] = False,
    images: Annotated[
        list[str] | None,
        typer.Option("--images", help="Check (and calibrate) on these; by default test images.", show_default=False),
    ] = None,
    hub: Annotated[
        Path | None, typer.Option("--hub", help="Write weights and a model card here.", show_default=False)
    ] = None,
) -> None:
    """Export to ONNX (compared with torch), to the library that the network was adopted from, or for a model hub."""
    if to is not None:
        return _export_to(to, step_dir, out, bool(int8 or images or hub))
    if out is None and hub is None:
        raise UserError("export: give --out model.onnx, or --hub FOLDER, or both")
    if not out and (int8 or images):
        raise UserError("--int8, --images: are for the ONNX file; give --out model.onnx too, or leave them out")
    if out:
        from starseg.inference.onnx import export_onnx

        export_onnx(step_dir, out, console, int8, images or [])
    if hub:
        from starseg.inference.hub import write_hub

        console.print(f"model card: {write_hub(step_dir, hub)}", highlight=False, soft_wrap=True)


def _export_to(form: str, step_dir: Path, out: Path | None, others: bool) -> None:
    """Export to a library's own form, or as a program of torch.export."""
    from starseg.inference.library import BUILDERS, export_library
    from starseg.inference.program import export_program

    if form not in (*BUILDERS, "program"):
        raise UserError(f"--to: expected {', '.join(BUILDERS)} or program, got {form!r}; ONNX needs no --to")
    if out is None:
        raise UserError(f"--to {form}: give --out {'model.pt2' if form == 'program' else 'FOLDER'}")
    if others:
        raise UserError(f"--to {form}: takes no --int8, --images or --hub, which are for other forms; leave them out")
    if form == "program":
        export_program(step_dir, out, console)
    else:
        export_library(step_dir, form, out, console)
