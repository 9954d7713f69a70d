"""Progress reports: a live bar on a terminal, one line per report elsewhere (as in a log file)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")


class Bar:
    """Progress of one phase of work.

    Args:
        console: prints the bar or the lines.
        title: name of the phase.
        total: number of units of work.
    """

    def __init__(self, console: Console, title: str, total: int) -> None:
        self.console, self.title, self.total, self.done, self.start = (
            console,
            title,
            total,
            0,
            time.monotonic(),
        )
        self.live: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(8),
                MofNCompleteColumn(),
                TextColumn("ETA"),
            )
            note = TextColumn("{task.fields[note]}", markup=False)
            self.live = Progress(*columns, TimeRemainingColumn(), note, console=console, transient=True)
            self.task = self.live.add_task(title, total=total, note="")

    def advance(self) -> None:
        """Count one unit of work as done."""
        self.done += 1
        if self.live:
            self.live.update(self.task, completed=self.done)

    def show(self, where: str, terms: Mapping[str, float], images: int) -> None:
        """Report loss terms and speed; ``images`` is the number of images per unit of work."""
        elapsed = time.monotonic() - self.start
        speed = self.done * images / elapsed
        note = " ".join([*(f"{k} {v:.3f}" for k, v in terms.items()), f"| {speed:.1f} img/s"])
        if self.live:
            self.live.update(self.task, note=f"{where} {note}")
        else:
            left = timedelta(seconds=int(elapsed / self.done * (self.total - self.done)))
            self.console.print(f"{self.title} {where} {note} | ETA {left}", highlight=False, soft_wrap=True)


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Bar]:
    """Show a bar for the duration of a block."""
    shown = Bar(console, title, total)
    if shown.live is None:
        yield shown
        return
    with shown.live:
        yield shown


def track(console: Console, title: str, items: Iterable[T], total: int, unit: str = "batches") -> Iterator[T]:
    """Yield ``items`` and show a bar."""
    with bar(console, title, total) as shown:
        for item in items:
            yield item
            shown.advance()
    if shown.live is None:
        seconds = time.monotonic() - shown.start
        console.print(f"{title}: {total} {unit}, {seconds:.1f} s", highlight=False, soft_wrap=True)
