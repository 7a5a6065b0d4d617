"""Progress over a model's blocks: a line each, with the time that is left."""

from __future__ import annotations

import time
from typing import Any

from bellbox.utils.progress import ProgressDisplay, clock


class BlockProgress(ProgressDisplay):
    """Where the driver says what happens. To be entered around it.

    Args:
        total: blocks of the model.
        start: blocks that were done before.
        show: False for silence.
    """

    def __init__(self, total: int, start: int, show: bool) -> None:
        super().__init__(show)
        self.total, self.start = total, start
        self._begun = time.monotonic()

    def columns(self, rich: Any) -> list[Any]:
        """Blocks done, what is done now, time left."""
        return [
            rich.TextColumn("block"),
            rich.MofNCompleteColumn(),
            rich.BarColumn(bar_width=24),
            rich.TextColumn("{task.fields[now]}"),
            rich.TextColumn("{task.fields[left]} left"),
        ]

    def fields(self) -> dict[str, Any]:
        """At the beginning."""
        return {"total": self.total, "completed": self.start, "now": "", "left": "?"}

    def now(self, what: str) -> None:
        """What is being done, for the bar."""
        if self.bar is not None:
            self.bar.update(self.task, now=what)

    def done(self, record: dict[str, Any]) -> None:
        """A block is done and saved."""
        number = record["block"] + 1
        spent = time.monotonic() - self._begun
        left = clock(spent / (number - self.start) * (self.total - number))
        if self.bar is not None:
            self.bar.update(self.task, completed=number, left=left)
        errors = [layer["error"] for layer in record["layers"].values()]
        steps = [group["steps"] for group in record["groups"]]
        learned = f"  LTDB {'+'.join(map(str, steps))} steps" if steps else ""
        self.note(
            f"block {number:>3}/{self.total}  error of the outputs {sum(errors) / len(errors):.4f} (worst "
            f"{max(errors):.4f}){learned}  {record['seconds']:.1f} s, {left} left"
        )
