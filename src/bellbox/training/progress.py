"""Showing how a run goes: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

from bellbox.errors import require


class Progress:
    """Where the loop says what happened. To be entered around the loop.

    Args:
        total: optimizer steps of the whole run.
        start: step that it goes on from.
        show: False for silence.
    """

    def __init__(self, total: int, start: int, show: bool = True):
        self.total, self.start, self.show = total, start, show
        self._begun = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._values = {"loss": "", "perplexity": "", "entropy": "", "speed": ""}

    def __enter__(self) -> Progress:
        if self.show and sys.stdout.isatty():
            rich = require("rich.progress", "cli")
            self._bar = rich.Progress(
                rich.TextColumn("step"),
                rich.MofNCompleteColumn(),
                rich.BarColumn(bar_width=24),
                rich.TextColumn("loss {task.fields[loss]}"),
                rich.TextColumn("ppl {task.fields[perplexity]}"),
                rich.TextColumn("entropy {task.fields[entropy]}"),
                rich.TextColumn("{task.fields[speed]} tok/s"),
                rich.TextColumn("left"),
                rich.TimeRemainingColumn(),
            )
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.total, completed=self.start, **self._values)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.show:
            print(text, flush=True)

    def step(self, step: int, loss: float) -> None:
        """A step was made."""
        if self._bar is not None:
            self._values["loss"] = f"{loss:.3f}"
            self._bar.update(self._task, completed=step, **self._values)

    def record(self, record: dict[str, Any]) -> None:
        """A record was written."""
        if record["kind"] == "eval":
            entropy = record.get("weight_entropy", {}).get("mean")
            self._values["perplexity"] = f"{record['perplexity']:.2f}"
            self._values["entropy"] = "-" if entropy is None else f"{entropy:.3f}"
            line = (
                f"step {record['step']:>6}  validation loss {record['loss']:.4f}  "
                f"perplexity {record['perplexity']:.3f}"
            )
            if record["bits_per_byte"] is not None:
                line += f"  bits/byte {record['bits_per_byte']:.4f}"
            self.note(line + ("" if entropy is None else f"  weight entropy {entropy:.3f} bits"))
            return
        self._values["speed"] = f"{record['tokens_per_s']:,.0f}"
        if self._bar is None:
            self.note(
                f"step {record['step']:>6}/{self.total}  loss {record['loss']:.4f}  "
                f"perplexity {record['perplexity']:.2f}  lr {record['lr']:.2e}  "
                f"{record['tokens_per_s']:,.0f} tokens/s  {self._left(record['step'])} left"
            )

    def _left(self, step: int) -> str:
        done = step - self.start
        seconds = (time.monotonic() - self._begun) / max(done, 1) * (self.total - step)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
