"""Atomic writes and JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from starseg.errors import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: ``path`` holds either its old content or all of ``data``.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot write it ({error.strerror}); the previous file is intact. "
            "Fix the cause and rerun the same command"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented JSON file, atomically."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file that starseg wrote.

    Raises:
        UserError: missing or damaged.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error})") from error
