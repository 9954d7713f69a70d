"""Text and JSON files, and atomic writes."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from starseg.errors import UserError

LONGEST_NAME = 255
"""Most bytes of a file name, on nearly all file systems."""
# The mark of UTF-16 in little-endian order is the beginning of that of UTF-32.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# A file of nothing but the mark of UTF-16 is more likely to be damaged than empty.
_NO_TEXT = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, errors: str = "strict") -> str:
    """Read a text file in UTF-8, or in the encoding that its byte order mark stands for.

    Windows editors and shells write byte order marks, also in UTF-16.

    Args:
        path: the file.
        errors: treatment of bytes that are not valid in the encoding, as for :func:`open`.

    Raises:
        OSError: the file is unreadable.
        UnicodeDecodeError: it is in another encoding.
    """
    with path.open("rb") as file:
        start = file.read(5)
    marked = (name for mark, name in _BYTE_ORDER_MARKS if start.startswith(mark) and start not in _NO_TEXT)
    encoding = next(marked, "utf-8")
    return path.read_text(encoding=encoding, errors=errors)


def split_lines(text: str) -> list[str]:
    r"""Split a text at \n, \r\n and \r.

    :meth:`str.splitlines` would also split at separators that names may contain, such as U+2028, U+0085 and \f.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file with one entry per line, which reads back as the same entries; bytes of file names are kept.

    Raises:
        UserError: an entry is empty, contains a line break, or begins or ends with white space.
    """
    lines = list(lines)
    if wrong := [line for line in lines if not line or line != line.strip() or len(split_lines(line)) > 1]:
        raise UserError(
            f"{path}: cannot write {wrong[0]!r} as a line; rename it without line breaks and outer white space"
        )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")


def parse_json(path: Path) -> Any:
    """Parse a JSON file that a user or another program wrote.

    Raises:
        OSError: the file is unreadable.
        ValueError: it is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: ``path`` holds either its old content or all of ``data``.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp")
    if len(os.fsencode(partial.name)) > LONGEST_NAME:
        partial = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()}.tmp")
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
        return parse_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot read it ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error})") from error
