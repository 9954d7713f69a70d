"""Translation of errors and signals into messages and exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from starseg.errors import Stopped, message


@contextmanager
def resumable() -> Iterator[None]:
    """Exit with code 143 on SIGTERM and 130 on Ctrl-C, with a message on how to resume."""
    try:
        yield
    except (KeyboardInterrupt, Stopped) as stop:
        Console(stderr=True).print("stopped; progress is saved, rerun the same command to resume")
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
        Console(stderr=True).print("[bold red]error:[/]", Text(text), highlight=False, soft_wrap=True)
        sys.exit(2)
