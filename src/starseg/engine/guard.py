"""Saving during a step, and handling of signals."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from lightning_fabric import Fabric

from starseg.errors import Stopped


class Guard:
    """Decides when to save; during training, turns SIGTERM and Ctrl-C into a save and an orderly exit.

    Args:
        fabric: whose processes must agree.
        minutes: longest time between two saves.
    """

    def __init__(self, fabric: Fabric, minutes: float) -> None:
        self.fabric, self.seconds = fabric, 60 * minutes
        self.saved, self.signal, self.waiting = time.monotonic(), 0, False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.waiting or self.signal:
            raise Stopped(number)
        self.signal = number

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle signals for the duration of a step; they end it at once if there is nothing to save."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone.
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Let signals wait for the next save from here on."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def due(self, epoch_ends: bool) -> bool:
        """Whether to save now, the same answer in every process. A signal is acted on by :meth:`saved_now`."""
        wanted = epoch_ends or bool(self.signal) or time.monotonic() - self.saved > self.seconds
        if self.fabric.world_size > 1:
            flag = torch.tensor([wanted, self.signal], device=self.fabric.device)
            wanted, number = self.fabric.all_reduce(flag, reduce_op="max").tolist()  # type: ignore[union-attr]
            self.signal = int(number)
        return bool(wanted)

    def saved_now(self) -> None:
        """Note a save; ends the process if a signal asked for that."""
        self.saved = time.monotonic()
        if self.signal:
            raise Stopped(self.signal)
