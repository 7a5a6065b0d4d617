"""Showing how a run goes: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from typing import Any

from bellbox.live import Live, clock


class Progress(Live):
    """Where the loop says what happened. To be entered around the loop.

    Args:
        total: optimizer steps of the whole run.
        start: step that it goes on from.
        show: False for silence.
    """

    def __init__(self, total: int, start: int, show: bool = True):
        super().__init__(show)
        self.total, self.start = total, start
        self._begun = time.monotonic()
        self._values = {"loss": "", "perplexity": "", "entropy": "", "speed": ""}

    def columns(self, rich: Any) -> list[Any]:
        """Step, loss, perplexity, entropy, speed, time left."""
        return [
            rich.TextColumn("step"),
            rich.MofNCompleteColumn(),
            rich.BarColumn(bar_width=24),
            rich.TextColumn("loss {task.fields[loss]}"),
            rich.TextColumn("ppl {task.fields[perplexity]}"),
            rich.TextColumn("entropy {task.fields[entropy]}"),
            rich.TextColumn("{task.fields[speed]} tok/s"),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(),
        ]

    def fields(self) -> dict[str, Any]:
        """At the beginning of the run."""
        return {"total": self.total, "completed": self.start, **self._values}

    def step(self, step: int, loss: float) -> None:
        """A step was made."""
        if self.bar is not None:
            self._values["loss"] = f"{loss:.3f}"
            self.bar.update(self.task, completed=step, **self._values)

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
        if self.bar is None:
            self.note(
                f"step {record['step']:>6}/{self.total}  loss {record['loss']:.4f}  "
                f"perplexity {record['perplexity']:.2f}  lr {record['lr']:.2e}  "
                f"{record['tokens_per_s']:,.0f} tokens/s  {self._left(record['step'])} left"
            )

    def _left(self, step: int) -> str:
        done = step - self.start
        return clock((time.monotonic() - self._begun) / max(done, 1) * (self.total - step))
