"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from starseg.errors import UserError

ConfigFile = Annotated[Path, typer.Argument(help="YAML configuration, see configs/.", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.base.epochs=5", show_default=False)]


def _in_a_folder(path: Path | None) -> Path | None:
    """Refuse an output file that cannot be written, before the work starts."""
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise UserError(f"--json {path}: expected a file in a folder that exists; give another one")
    return path


JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the results to this file.", callback=_in_a_folder, show_default=False),
]


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Parse comma-separated numbers ("0.75,1").

    Raises:
        UserError: they are no numbers.
    """
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise UserError(f"{option}: expected numbers with commas between them, got {text!r}") from None
