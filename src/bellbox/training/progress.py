"""Showing how a run goes: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from typing import Any

from bellbox.utils.progress import ProgressDisplay, clock


class Progress(ProgressDisplay):
    """Where the loop says what happened. To be entered around the loop.

    Args:
        total: optimizer steps of the whole run.
        start: step that it goes on from.
        show: False for silence.
        unit: what the run counts: tokens or images.
    """

    def __init__(self, total: int, start: int, show: bool = True, unit: str = "tokens"):
        super().__init__(show)
        self.total, self.start, self.unit = total, start, unit
        self._begun = time.monotonic()
        self._values = {"loss": "", "judged": "", "entropy": "", "speed": ""}

    def columns(self, rich: Any) -> list[Any]:
        """Step, loss, perplexity or accuracy, entropy, speed, time left."""
        return [
            rich.TextColumn("step"),
            rich.MofNCompleteColumn(),
            rich.BarColumn(bar_width=24),
            rich.TextColumn("loss {task.fields[loss]}"),
            rich.TextColumn("{task.fields[judged]}"),
            rich.TextColumn("entropy {task.fields[entropy]}"),
            rich.TextColumn(f"{{task.fields[speed]}} {self.unit}/s"),
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
            self._values["judged"] = judged(record)
            self._values["entropy"] = "-" if entropy is None else f"{entropy:.3f}"
            line = f"step {record['step']:>6}  validation loss {record['loss']:.4f}  {judged(record)}"
            if record.get("bits_per_byte") is not None:
                line += f"  bits/byte {record['bits_per_byte']:.4f}"
            self.note(line + ("" if entropy is None else f"  weight entropy {entropy:.3f} bits"))
            if (widths := record.get("widths")) is not None:
                each = (f"{bits} bits {judged(one)}" for bits, one in widths.items())
                self.note(f"{'':11}  at its widths: {', '.join(each)}")
            return
        self._values["speed"] = f"{record['tokens_per_s']:,.0f}"
        if self.bar is None:
            known = f"{judged(record)}  " if "perplexity" in record else ""
            self.note(
                f"step {record['step']:>6}/{self.total}  loss {record['loss']:.4f}  {known}lr {record['lr']:.2e}  "
                f"{record['tokens_per_s']:,.0f} {self.unit}/s  {self._left(record['step'])} left"
            )

    def _left(self, step: int) -> str:
        done = step - self.start
        return clock((time.monotonic() - self._begun) / max(done, 1) * (self.total - step))


def judged(record: dict[str, Any]) -> str:
    """What a record is judged by: `perplexity 12.345`, or `accuracy 87.65 %`."""
    if record.get("accuracy") is not None:
        return f"accuracy {100 * record['accuracy']:.2f} %"
    return f"perplexity {record['perplexity']:.3f}"
