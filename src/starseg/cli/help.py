"""Help of the command line: examples, completions, the list of methods."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from starseg.errors import UserError

# Lines of at most 78 characters, so that a terminal of 80 columns does not break them; rich takes [words] as markup.
EXAMPLES = {
    "starseg": (
        "starseg demo                     # see it at work: nothing to download",
        "starseg train configs/voc/15-1.yaml data.root=/data/PascalVOC2012",
        "starseg learn --help             # your own photos and classes",
        "starseg --install-completion     # the tab key completes commands",
    ),
    "train": (
        "starseg train configs/voc/15-1.yaml data.root=/data/PascalVOC2012",
        "starseg train configs/voc/15-5.yaml method=mib task.setting=disjoint",
        "starseg train configs/ade/100-10.yaml --devices 2 --steps 0-1",
    ),
    "learn": (
        "starseg learn runs/my/step_3 --images photos --masks masks \\",
        "    --classes horse --out runs/horse --dry-run",
        "starseg learn --new --images photos --masks masks --classes classes.txt \\",
        "    --out runs/pets",
    ),
    "adopt": (
        "starseg adopt torchvision:deeplabv3_resnet50 --weights DEFAULT --out runs/voc",
        "starseg adopt smp:Unet:resnet34 --weights unet.pth \\",
        "    --classes background,road,car --out runs/road",
        "starseg adopt segformer_folder --out runs/segformer",
        "starseg adopt unet_folder --classes background,road,car --photos photos \\",
        "    --out runs/road",
    ),
    "eval": (
        "starseg eval runs/my/step_3",
        "starseg eval runs/my/step_3 eval.image=full --json figures.json",
        "starseg eval checkpoint-epoch60.pth data.root=/data/PascalVOC2012",
    ),
    "predict": (
        "starseg predict runs/my/step_3 photos --out found --overlays",
        'starseg predict runs/my/step_3 a.jpg "more/**/*.png" --out found \\',
        "    --json shares.json --window --flip --scales 0.75,1,1.25",
    ),
    "app": (
        "starseg app runs/my",
        "starseg app runs/star --compare runs/finetune --port 0",
    ),
    "export": (
        "starseg export runs/my/step_3 --out model.onnx",
        "starseg export runs/my/step_3 --out small.onnx --int8 --images photos",
        "starseg export runs/my/step_3 --hub my_model",
        "starseg export horse/step_1 --to transformers --out segformer_with_horse",
        "starseg export runs/my/step_3 --to program --out model.pt2",
    ),
    "report": (
        "starseg report runs/my",
        "starseg report runs/star runs/mib --out compare.html",
    ),
    "compare": (
        "starseg compare configs/voc/15-5.yaml --methods star,mib,plop",
        "starseg compare runs/demo/star/config.yaml --methods star,lwf \\",
        "    --seeds 0,1,2 --out runs/compare train.later.epochs=4",
        "starseg compare configs/voc/15-5.yaml --methods star,mib \\",
        "    --out runs/best --sweep train.base.lr=0.002,0.01 --sweep star.ocfm=1,5",
    ),
    "demo": ("starseg demo", "starseg demo --out /tmp/demo"),
    "bench": ("starseg bench --json bench.json", "starseg bench --quick"),
    "methods": ("starseg methods", "starseg methods star"),
    "tasks": (
        "starseg tasks voc",
        "starseg tasks voc 15-5s --root /data/PascalVOC2012 --setting disjoint",
    ),
    "index": ("starseg data index configs/voc/15-1.yaml",),
    "check": (
        "starseg data check configs/voc/15-1.yaml data.root=/data/PascalVOC2012",
        "starseg data check configs/ade/100-10.yaml --json found.json",
    ),
}


def examples(command: str) -> str:
    """Return the examples at the end of a command's help."""
    return "\n".join(("Examples:", *EXAMPLES[command]))


def complete_methods(incomplete: str) -> list[str]:
    """Complete method names in a comma-separated list without the slow import of the methods.

    Methods of other packages are not among them.
    """
    before, comma, _ = incomplete.rpartition(",")
    sources = (path.read_text() for path in (Path(__file__).parents[1] / "methods").glob("*.py"))
    names = (name for source in sources for name in re.findall(r'^@register_method\("([\w-]+)"\)', source, re.M))
    return sorted(f"{before}{comma}{name}" for name in names)


def show_methods(console: Console) -> None:
    """Print name and summary of every method."""
    from starseg.methods import METHODS

    table = Table("method", "what it does", box=None, pad_edge=False)
    for name, method in sorted(METHODS.items()):
        table.add_row(Text(name, "bold"), method.summary)
    console.print(table)
    console.print("\nstarseg methods NAME: its source, what it keeps and its options", highlight=False)


def show_method(name: str, console: Console) -> None:
    """Print everything about a method.

    Raises:
        UserError: there is none of this name.
    """
    from starseg.methods import METHODS

    if name not in METHODS:
        raise UserError(f"methods: unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    rows: list[tuple[str, Any]] = [
        (name, method.summary),
        ("source", method.source),
        ("keeps", method.stores),
        *((f"{method.section}.{key}", _described(field)) for key, field in method.Options.model_fields.items()),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    for left, right in rows:
        table.add_row(Text(left, "bold"), Text(str(right)))
    console.print(table)


def _described(field: Any) -> str:
    default = "" if field.default is None else f" [{field.default}]"
    return f"{' '.join((field.description or '').split())}{default}"
