"""Time measurement of the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
Mark = float | torch.cuda.Event


class Clock:
    """Seconds spent in named parts; the time of a nested part does not count for the enclosing one.

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
        """Add the time of a block to ``part``."""
        outer = self.part
        self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def timed(self, part: str, call: Callable[..., T]) -> Callable[..., T]:
        """Wrap ``call`` so that its time is added to ``part``."""

        def run(*args: object, **kwargs: object) -> T:
            with self.time(part):
                return call(*args, **kwargs)

        return run

    def each(self, part: str, items: Iterator[T]) -> Iterator[T]:
        """Yield ``items``, adding the time spent waiting for each to ``part``."""
        done = object()
        while (item := self.timed(part, next)(items, done)) is not done:
            yield item

    def read(self) -> dict[str, float]:
        """Return the seconds of every part so far, after waiting for the GPU's pending work."""
        if self.cuda and self.marks:
            torch.cuda.synchronize()
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            if part:
                passed = end - start if isinstance(end, float) else start.elapsed_time(end) / 1000  # type: ignore
                self.seconds[part] = self.seconds.get(part, 0.0) + passed
        del self.marks[:-1]
        return self.seconds

    def scalars(self) -> dict[str, float]:
        """Return the result of :meth:`read` under the names used in the logs."""
        return {f"time/{part}": seconds for part, seconds in self.read().items()}
