"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
Mark = float | torch.cuda.Event


class Clock:
    """Seconds spent in named parts; a part within another is not the other's.

    On a GPU the parts are bounded by events in its queue; nothing waits for them before :meth:`read`.

    Attributes:
        seconds: of each part, as far as read.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.cuda, self.part, self.marks = device.type == "cuda", "", list[tuple[str, Mark]]()

    def _switch(self, part: str) -> None:
        mark: Mark = time.perf_counter()
        if self.cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append((self.part, mark))
        self.part = part

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Count the time of a block as ``part``'s."""
        outer = self.part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def timed(self, part: str, call: Callable[..., T]) -> Callable[..., T]:
        """``call`` with its time counted as ``part``'s."""

        def run(*args: object, **kwargs: object) -> T:
            with self.time(part):
                return call(*args, **kwargs)

        return run

    def each(self, part: str, items: Iterator[T]) -> Iterator[T]:
        """Pass ``items`` through, the wait for each counted as ``part``'s."""
        done = object()
        while (item := self.timed(part, next)(items, done)) is not done:
            yield item

    def read(self) -> dict[str, float]:
        """Add up what was marked since the last time; waits for a GPU to get there."""
        if self.cuda and self.marks:
            torch.cuda.synchronize()
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            if part:
                passed = end - start if isinstance(end, float) else start.elapsed_time(end) / 1000  # type: ignore
                self.seconds[part] = self.seconds.get(part, 0.0) + passed
        del self.marks[:-1]
        return self.seconds

    def scalars(self) -> dict[str, float]:
        """What :meth:`read` gives, named for the log."""
        return {f"time/{part}": seconds for part, seconds in self.read().items()}
