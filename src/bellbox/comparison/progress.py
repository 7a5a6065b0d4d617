"""Progress of a whole grid: a live bar on a terminal, a line a run anywhere else."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from bellbox.comparison.plan import Plan, Wanted
from bellbox.comparison.process import Process
from bellbox.comparison.results import Result
from bellbox.training.progress import judged
from bellbox.utils.progress import ProgressDisplay, clock

_LINE_SECONDS = 60.0


class GridProgress(ProgressDisplay):
    """Where the runner says what happens. To be entered around it.

    Args:
        plan: what is wanted and what is there.
        jobs: runs at a time.
        show: False for silence.
    """

    def __init__(self, plan: Plan, jobs: int, show: bool):
        super().__init__(show)
        self.plan, self.jobs = plan, jobs
        self._spent, self._stepped = 0.0, 0
        self._said = time.monotonic()

    def columns(self, rich: Any) -> list[Any]:
        """Runs done, what runs now, time left."""
        return [
            rich.TextColumn("runs {task.fields[runs]}"),
            rich.BarColumn(bar_width=20),
            rich.TextColumn("{task.fields[now]}"),
            rich.TextColumn("{task.fields[left]} left"),
        ]

    def fields(self) -> dict[str, Any]:
        """Before anything is known."""
        return {"total": 1, "runs": "", "now": "", "left": "?"}

    def announce(self, folder: Path) -> None:
        """What is about to happen."""
        grid, missing = self.plan.grid, len(self.plan.missing())
        total = grid.runs
        done = sum(self.plan.result(run) is not None for run in self.plan.runs())
        self.note(f"study {grid.study} in {folder}: {total} runs, {done} done, {missing} to run by now")

    def update(self, active: list[Process]) -> None:
        """Called many times a second."""
        now = time.monotonic()
        wait = 0.5 if self.bar is not None else _LINE_SECONDS
        if now - self._said < wait:
            return
        self._said = now
        running = ", ".join(
            f"{p.wanted.cell.label}, lr {p.wanted.lr:g}, seed {p.wanted.seed}: step {p.step}"
            f"/{p.wanted.config.total_steps}"
            for p in active
        )
        done, total = self._count()
        if self.bar is not None:
            self.bar.update(
                self.task,
                completed=done,
                total=total,
                runs=f"{done}/{total}",
                now=running,
                left=self._left(active),
            )
        else:
            self.note(f"  {done}/{total} runs done; {running}; {self._left(active)} left")

    def ended(self, run: Wanted, result: Result, process: Process | None, *, reused: bool) -> None:
        """A run has its result."""
        if process is not None:
            self._spent += process.seconds
            self._stepped += max(0, result.steps - process.first_step)
        done, total = self._count()
        if result.error is not None:
            what = f"FAILED: {result.error}"
        else:
            what = "diverged" if result.metric is None else judged(vars(result))
            if result.weight_entropy is not None:
                what += f", weight entropy {result.weight_entropy:.3f}"
            what += " (known from another study)" if reused else ""
            what += "" if process is None else f", {clock(process.seconds)}"
        left = self._left([])
        self.note(f"[{done}/{total}] {run.cell.label}, lr {run.lr:g}, seed {run.seed}: {what}; {left} left")

    def _count(self) -> tuple[int, int]:
        """Runs with a result, and runs in all: those of a cell whose rates all failed do not come."""
        known = list(self.plan.runs())
        done = sum(self.plan.result(run) is not None for run in known)
        hopeless = sum(len(cell.seeds) - 1 for cell in self.plan.grid.cells if self.plan.is_hopeless(cell))
        return done, self.plan.grid.runs - hopeless

    def _left(self, active: list[Process]) -> str:
        """Time left, from the steps and seconds of this start."""
        spent = self._spent + sum(process.seconds for process in active)
        stepped = self._stepped + sum(max(0, process.step - process.first_step) for process in active)
        if not stepped:
            return "unknown time"
        done, total = self._count()
        sizes = [run.config.total_steps for run in self.plan.runs()]
        steps = (total - done) * sum(sizes) / len(sizes) - sum(process.step for process in active)
        return clock(max(0.0, steps) * spent / stepped / self.jobs)
