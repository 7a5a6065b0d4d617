"""Showing how a long job goes: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
from typing import Any, Self

from bellbox.errors import require


class ProgressDisplay:
    """A bar with one task, and lines that stay. To be entered around the job.

    Args:
        show: False for silence.
    """

    def __init__(self, show: bool) -> None:
        self.show = show
        self.bar: Any = None
        """A `rich.progress.Progress` while the job runs on a terminal, else None."""
        self.task: Any = None
        """Its task."""

    def columns(self, rich: Any) -> list[Any]:
        """What stands in the bar, from the module `rich.progress`."""
        raise NotImplementedError

    def fields(self) -> dict[str, Any]:
        """Arguments of the bar's task: `total`, and the fields that the columns show."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        if self.show and sys.stdout.isatty():
            rich = require("rich.progress", "cli")
            self.bar = rich.Progress(*self.columns(rich))
            self.bar.start()
            self.task = self.bar.add_task("", **self.fields())
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.show:
            print(text, flush=True)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
