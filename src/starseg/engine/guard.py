"""Timing of saves during training, and handling of signals."""

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
    """Decides when to save the training state, and turns SIGTERM and Ctrl-C during training into a save and an exit.

    Args:
        fabric: the Fabric whose processes must decide alike.
        minutes: maximum time between two saves.
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
        """Handle signals for the duration of a step; outside :meth:`saving`, they stop it immediately."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals only to the main thread.
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
        """Delay signals until the next save; a second signal stops immediately."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def due(self, epoch_ends: bool) -> bool:
        """Return whether to save now, alike in every process; :meth:`saved_now` must be called after the save."""
        wanted = epoch_ends or bool(self.signal) or time.monotonic() - self.saved > self.seconds
        if self.fabric.world_size > 1:
            flag = torch.tensor([wanted, self.signal], device=self.fabric.device)
            wanted, number = self.fabric.all_reduce(flag, reduce_op="max").tolist()  # type: ignore[union-attr]
            self.signal = int(number)
        return bool(wanted)

    def saved_now(self) -> None:
        """Record a save.

        Raises:
            Stopped: a signal has been received.
        """
        self.saved = time.monotonic()
        if self.signal:
            raise Stopped(self.signal)
