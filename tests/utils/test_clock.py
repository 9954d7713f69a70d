"""The clock of a step's parts."""

from types import SimpleNamespace

import pytest
import torch

from starseg.utils import clock as module
from starseg.utils.clock import Clock


def test_nested_parts_are_timed_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(seconds: float) -> None:
        now[0] += seconds

    clock = Clock(torch.device("cpu"))
    work(100)
    with clock.time("outer"):
        work(2)
        clock.timed("inner", work)(5)
        work(1)
    for _ in clock.each("wait", map(work, [7, 8])):
        work(100)
    assert clock.read() == {"outer": 3, "inner": 5, "wait": 15}
    clock.timed("inner", work)(1)
    assert clock.scalars() == {"time/outer": 3, "time/inner": 6, "time/wait": 15}
