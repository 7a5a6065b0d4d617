"""Waiting for other processes by what they do, not by the clock: on a loaded machine everything takes longer.

A process is given up where it is stuck, which is to say that it and its children have used no processor time for
`STILL` seconds, or where it has used more of it than the work can take, however long that took.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

STILL = 120.0
WORK = 180.0
"""Seconds of processor time."""


def processor_seconds(pid: int) -> float | None:
    """What a process and its descendants have used so far; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # its own, and of children that are gone
    return own + sum(processor_seconds(int(child)) or 0.0 for child in children)


class Watch:
    """Fails where a process is stuck or at work for too long."""

    def __init__(self, pid: int | None, what: str, work: float = WORK) -> None:
        self.pid, self.what, self.work = pid, what, work
        self._begun = processor_seconds(pid) if pid is not None else None
        self._used, self._moved = 0.0, time.monotonic()

    def check(self) -> None:
        """Called again and again while waiting."""
        now = processor_seconds(self.pid) if self.pid is not None else None
        if now is not None and self._begun is not None and now - self._begun > self._used:
            self._used, self._moved = now - self._begun, time.monotonic()
        assert self._used < self.work, f"{self.what}: {self._used:.0f} s of work, and still not done"
        quiet = time.monotonic() - self._moved
        assert quiet < STILL, f"{self.what}: nothing has happened for {quiet:.0f} s"


def wait_for(condition: Callable[[], bool], what: str, pid: int | None = None, pause: float = 0.01) -> None:
    """Until something holds that a process is at work on."""
    watch = Watch(pid, f"waited for {what}")
    while not condition():
        watch.check()
        time.sleep(pause)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a process has said when it has ended; it is killed where it is stuck."""
    watch = Watch(process.pid, f"waited for {process.args!r} to end")
    while True:
        try:
            return process.communicate(timeout=0.2)
        except subprocess.TimeoutExpired:
            try:
                watch.check()
            except AssertionError:
                process.kill()
                raise


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with its output as text, for as long as it gets on."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    out, error = finish(process)
    return subprocess.CompletedProcess(command, process.returncode, out, error)
