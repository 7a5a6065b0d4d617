"""Leaving cleanly on Ctrl-C and SIGTERM: finish the step, save, go. A second signal leaves at once.

Under a launcher it does not: a scheduler's signal comes to the process, and once more from the launcher, which had it
too. The launcher kills what does not end (torchrun after 30 seconds).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """Raised inside `StopSignals.interruptible`; no `Exception`, so that nobody swallows it."""


class StopSignals:
    """While entered, remembers SIGINT and SIGTERM in `received` instead of dying of them.

    Python delivers signals to the main thread only; entered elsewhere, it does nothing.

    Args:
        launched: whether a launcher started this process, and signals may come twice.
    """

    def __init__(self, launched: bool = False) -> None:
        self._launched = launched
        self.received: int | None = None
        self._interruptible = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it, a signal raises `Stopped` at once: for long work that changes nothing."""
        self._interruptible = True
        try:
            if self.received is not None:
                raise Stopped
            yield
        finally:
            self._interruptible = False

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if self._launched:
                return
            raise KeyboardInterrupt
        self.received = number
        if self._interruptible:
            raise Stopped
