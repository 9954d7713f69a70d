"""Export of a step as a self-contained program of `torch.export` (`starseg export --to program`)."""

from __future__ import annotations

import io
import json
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from starseg import __version__
from starseg.errors import UserError
from starseg.inference.history import read_history
from starseg.inference.onnx import Graph, largest_logit
from starseg.inference.predictor import load
from starseg.report.templating import template
from starseg.utils.files import write_atomic

_ABOUT = "classes.json"
_TOLERANCE, _AGREEMENT = 1e-3, 0.999
_CODE = """import json, torch

extra = {"classes.json": ""}
network = torch.export.load("NAME", extra_files=extra).module()
logits, mask = network(images)  # uint8 [N, 3, SIDE, SIDE], not normalised
classes = json.loads(extra["classes.json"])["classes"]"""


@torch.no_grad()
def export_program(step_dir: Path, out: Path, console: Console) -> Path:
    """Write the program, read it back and compare it with the step; a model card is written beside it.

    The program takes uint8 images of the size of the training crops, and returns logits and masks.

    Args:
        step_dir: what to export.
        out: the .pt2 file.
        console: where the comparison is printed.

    Returns:
        The model card.

    Raises:
        UserError: the network cannot be traced, or the program predicts something else.
    """
    if out.suffix != ".pt2":
        raise UserError(f"--out {out}: a program of torch.export is a .pt2 file; give --out {out.with_suffix('.pt2')}")
    predictor = load(step_dir, "cpu", "32")
    info, side = predictor.info, predictor.crop
    graph = Graph(predictor).eval()
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    about = {"classes": predictor.classes, "dataset_ids": predictor.dataset_ids, "crop": side}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        path = Path(folder) / out.name
        program, free = _trace(graph, images, step_dir)
        torch.export.save(program, path, extra_files={_ABOUT: json.dumps(about)})
        read = torch.export.load(path).module()
        checked = images[:1] if free else images
        agreement = _compare(graph(checked), read(checked), step_dir)
        card = template("library_card.md.j2").render(
            title=f"{info.method}, {info.dataset} {info.task}, step {info.step}",
            library="torch",
            classes=[(i, name) for i, name in info.predictable.items()],
            column="id in the mask",
            rule="`mask` holds the ids below.",
            code=_CODE.replace("NAME", out.name).replace("SIDE", str(side)).replace("N,", "N," if free else "2,"),
            agreement=agreement,
            history=read_history(step_dir, info),
            version=__version__,
            input=f"uint8 RGB images of {side} x {side} pixels, not normalised",
        )
        write_atomic(out, path.read_bytes())
    write_atomic(out.with_suffix(".md"), card.encode(errors="backslashreplace"))
    console.print(f"compared with starseg: {agreement}", highlight=False, soft_wrap=True)
    console.print(f"program: {out}, with a model card {out.with_suffix('.md')}", highlight=False, soft_wrap=True)
    return out.with_suffix(".md")


def _trace(graph: Graph, images: Tensor, step_dir: Path) -> tuple[torch.export.ExportedProgram, bool]:
    """Trace the graph, with a free number of images if the network allows it; the second value tells."""
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=1024)}}
    # Where it fails, torch prints the whole graph.
    with suppress(Exception), redirect_stderr(io.StringIO()):  # exceptions of many kinds: then the number is fixed
        return torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False), True
    try:
        with redirect_stderr(io.StringIO()):
            return torch.export.export(graph, (images,), strict=False), False
    except Exception as error:
        raise UserError(
            f"{step_dir}: torch.export cannot trace this network ({str(error).splitlines()[0]}); take --out model.onnx "
            "without --to"
        ) from error


def _compare(expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], step_dir: Path) -> str:
    difference, largest = float((found[0] - expected[0]).abs().max()), float(largest_logit(expected[0]))
    same = float((found[1] == expected[1]).float().mean())
    said = (
        f"max |logit difference| {difference:.2g} (largest logit {largest:.3g}), the same class on {100 * same:.3f} % "
        "of the pixels"
    )
    if difference > _TOLERANCE * max(1.0, largest) or same < _AGREEMENT:
        raise UserError(f"{step_dir}: the program disagrees with the step, so it was not kept: {said}")
    return said
