"""SIGTERM and SIGINT stop a run after its current step, on all of its processes after the same one."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator

__all__ = ['Interrupted', 'StopSignals']

MOST_UPDATES = 20  # between two checks of the signals of other processes
SECONDS = 5  # between two such checks; launchers kill after half a minute


class Interrupted(Exception):
    """SIGTERM or SIGINT ended a run early. It was saved, and the message says how to resume."""


class StopSignals:
    """Whether a signal has asked any process of a run to stop.

    Args:
        accelerator: The processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.asked = False
        self.checks_in, self.interval, self.checked = 1, 1, time.perf_counter()  # in updates, updates, seconds

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside; a second one acts as usual."""

        def ask(number: int, frame: Any) -> None:
            self.asked = True
            signal.signal(number, before[number])

        before: dict[Any, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, ask)
        except ValueError:  # only the main thread may set handlers
            pass
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def seen(self) -> bool:
        """Whether to stop after this update; every process must ask after every update, and all get one answer."""
        if self.accelerator.num_processes == 1:
            return self.asked
        self.checks_in -= 1
        if self.checks_in:
            return False
        now = time.perf_counter()
        own = torch.tensor([float(self.asked), now - self.checked], device=self.accelerator.device)
        asked, seconds = self.accelerator.reduce(own, 'sum').tolist()
        # The sum of all clocks gives every process the same interval.
        per_update = max(seconds, 1e-9) / self.accelerator.num_processes / self.interval
        self.checks_in = self.interval = max(1, min(MOST_UPDATES, int(SECONDS / per_update)))
        self.checked = now
        return asked > 0
