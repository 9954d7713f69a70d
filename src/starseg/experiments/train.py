"""A run from its configuration, with a table of results after each step."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from starseg.config import RunConfig
from starseg.engine.runner import Runner
from starseg.report.tables import print_results
from starseg.utils.terminal import make_console


def train(config: RunConfig, steps: range | None = None, console: Console | None = None) -> Path:
    """Run a configuration; finished steps are skipped.

    Args:
        config: see :mod:`starseg.config`.
        steps: which steps; all by default.
        console: where progress and tables are printed; the terminal by default.

    Returns:
        The run directory.

    Raises:
        UserError: anything in the input that must be corrected first.
    """
    console = console or make_console()
    with Runner(config, console, steps, listeners=[print_results(console)]) as runner:
        return runner.run()
