"""Consoles on which any text can be printed, and translation of errors and signals into messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from starseg.errors import Stopped, message


class _Stream:
    """Standard output or error stream, on which characters that its encoding lacks are written as escape sequences.

    File names that are not valid UTF-8 contain such characters in every encoding.

    Args:
        name: "stdout" or "stderr"; the stream of that name at the time of writing is used.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def _target(self) -> Any:
        stream = getattr(sys, self._name)
        # While a progress bar is shown, rich replaces the streams by ones that print to the console.
        return getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        target = self._target()
        encoding = getattr(target, "encoding", None) or "utf-8"
        target.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target(), name)


def make_console(stderr: bool = False, quiet: bool = False) -> Console:
    """Create a console of the terminal that prints text as it is, without markup, emoji codes and highlighting.

    Args:
        stderr: print on standard error instead of standard output.
        quiet: print nothing.
    """
    stream = cast(IO[str], _Stream("stderr" if stderr else "stdout"))
    return Console(file=stream, quiet=quiet, markup=False, emoji=False, highlight=False)


def labelled(label: str, style: str, text: str) -> Text:
    """Return a text after a styled label, such as a red "error:"."""
    return Text.assemble((label, style), " ", text)


def print_note(text: str) -> None:
    """Print a note on standard error."""
    make_console(stderr=True).print(f"note: {text}", soft_wrap=True)


@contextmanager
def resumable() -> Iterator[None]:
    """Exit with code 143 on SIGTERM and 130 on Ctrl-C, with a message on how to resume."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        make_console(stderr=True).print("stopped; progress is saved, rerun the same command to resume")
        raise SystemExit(stop.code if isinstance(stop, Stopped) else 130) from None


@contextmanager
def reporting_errors(debug: bool) -> Iterator[None]:
    """Report errors that a user can fix as one message with exit code 2, or as a traceback if ``debug``."""
    try:
        yield
    except Exception as error:
        text = None if debug else message(error)
        if text is None:
            raise
        make_console(stderr=True).print(labelled("error:", "bold red", text), soft_wrap=True)
        sys.exit(2)
