"""Running what is missing of a grid: one process a run, so that a failure or a kill costs one run at most."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bellbox.comparison.grid import Grid
from bellbox.comparison.plan import Plan, Wanted
from bellbox.comparison.process import Process
from bellbox.comparison.progress import GridProgress
from bellbox.comparison.results import Result, Results
from bellbox.comparison.selection import keep
from bellbox.comparison.worker import SYSTEM
from bellbox.errors import BellboxError
from bellbox.runs.build import pick_device
from bellbox.runs.environment import describe
from bellbox.training.stop import StopSignals
from bellbox.utils.files import lock

RUNS = "runs"


@dataclass(frozen=True)
class Outcome:
    """How far a grid came."""

    done: int
    """Runs with a result."""
    total: int
    """Runs that are known to be wanted."""
    failed: int
    """Of those done, how many did not finish."""
    killed: int
    """Runs that something killed; they have no result and are tried again the next time."""
    stopped_by: int | None
    """Number of the signal that stopped it early."""


def run_grid(
    grid: Grid,
    folder: Path,
    *,
    jobs: int = 1,
    keep_runs: bool = False,
    retry: bool = False,
    show: bool = True,
) -> Outcome:
    """Run what a grid wants and `folder` has no result of yet.

    Args:
        grid: what is to be compared.
        folder: for `results.jsonl` and, while they are under way, the runs.
        jobs: runs at a time.
        keep_runs: leave finished run folders (checkpoints and all) where they are.
        retry: try failed runs again.
        show: whether to print progress.

    Raises:
        BellboxError: the data cannot be opened, a row cannot be trained or compared with the others, or another
            process works in the folder.
    """
    if jobs < 1:
        raise BellboxError(f"jobs is {jobs}, must be at least 1")
    with ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(lock(folder))
        runner = _Runner(grid, folder, jobs, keep_runs, show)
        if retry:
            runner.forget_failures()
        runner.plan.check()
        keep(folder, runner.plan)
        signals = stack.enter_context(StopSignals())
        stack.enter_context(runner.progress)
        return runner.run(signals)


class _Runner:
    def __init__(self, grid: Grid, folder: Path, jobs: int, keep_runs: bool, show: bool):
        self.grid, self.folder, self.jobs, self.keep_runs = grid, folder, jobs, keep_runs
        self.results = Results(folder)
        self.plan = Plan(grid, self.results)
        self.progress = GridProgress(self.plan, jobs, show)
        self.active: list[Process] = []
        self.killed: set[str] = set()
        self._environment: dict[str, dict[str, Any]] = {}
        self._clear_recorded_runs()

    def forget_failures(self) -> None:
        failed = {run.key for run in self.plan.runs() if (r := self.plan.result(run)) and r.error is not None}
        self.results.drop_failed(failed)

    def run(self, signals: StopSignals) -> Outcome:
        """Keep `jobs` processes going until nothing is missing, or a signal comes."""
        self.progress.announce(self.folder)
        try:
            while signals.received is None:
                self._start_what_is_missing()
                if not self.active:
                    break
                time.sleep(0.05)
                self.progress.update(self.active)
                self._collect()
        finally:
            try:
                if self.active:
                    self.progress.note(f"stopping: {len(self.active)} run(s) save and leave")
            finally:  # also where nobody reads the note any more
                for process in self.active:
                    process.stop()
            # One that had just finished when the signal came has its result all the same.
            self.active = [process for process in self.active if process.poll() == 0]
            self._collect()
        runs = list(self.plan.runs())
        found = [result for run in runs if (result := self.plan.result(run)) is not None]
        failed = sum(result.error is not None for result in found)
        return Outcome(len(found), len(runs), failed, len(self.killed), signals.received)

    def _start_what_is_missing(self) -> None:
        if (
            len(self.active) >= self.jobs
        ):  # asked many times a second: nothing to work out, the runs need the time
            return
        for run in self.plan.missing():
            if len(self.active) >= self.jobs:
                return
            busy = {process.wanted.key for process in self.active} | self.killed
            if run.key in busy:
                continue
            known = self.plan.elsewhere(run)
            if known is not None:
                self._add(run, {name: getattr(known, name) for name in _MEASURED}, known)
            else:
                self.active.append(Process(run, self._run_folder(run)))

    def _collect(self) -> None:
        for process in [process for process in self.active if process.poll() is not None]:
            self.active.remove(process)
            status, run = process.poll(), process.wanted
            if status == 0:
                self._add_widths(run, process.measured(), process)
                if not self.keep_runs:
                    shutil.rmtree(process.folder)
            elif status == SYSTEM:
                raise BellboxError(f"{run.cell.label}: {process.complaint()}; once put right, start it again")
            elif status in (1, 2):
                self._add_widths(run, {"error": process.complaint()}, process)
            else:
                self.killed.add(run.key)
                self.progress.note(
                    f"{run.cell.label}: killed (status {status}); the next start goes on with it"
                )

    def _add_widths(self, run: Wanted, found: dict[str, Any], process: Process) -> None:
        """A result for each width of a run that is not there yet; the process' time counts once."""
        by_width: dict[str, Any] = found.pop("widths", {})
        for each in self.plan.widths(run):
            if self.plan.result(each) is None:
                bits = "" if each.cell.bits is None else f"{each.cell.bits:.0f}"
                self._add(each, by_width.get(bits, found), None, process if each is run else None)

    def _add(
        self, run: Wanted, found: dict[str, Any], known: Result | None, process: Process | None = None
    ) -> None:
        config = run.config.to_dict()
        config.pop("folder")
        environment = self._describe(run.config.device)
        machine = {key: environment[key] for key in ("cpu", "cpu_count", "device", "torch", "kernels")}
        threads = run.config.threads or environment["threads"]
        revision = environment["git"]
        version = environment["bellbox"] + (f", {revision['revision'][:10]}" if revision else "")
        result = Result(
            study=self.grid.study,
            row=run.cell.row,
            bits=run.cell.bits,
            lr=run.lr,
            seed=run.seed,
            overrides=run.cell.overrides,
            config=config,
            data=run.data,
            machine={**machine, "threads": threads} if known is None else known.machine,
            date=datetime.date.today().isoformat() if known is None else known.date,
            version=version if known is None else known.version,
            **found,
        )
        self.results.add(result)
        self.progress.ended(run, result, process, reused=known is not None)

    def _describe(self, device: str) -> dict[str, Any]:
        if device not in self._environment:
            self._environment[device] = describe(
                pick_device(device) if device != "cuda" else torch.device("cuda")
            )
        return self._environment[device]

    def _run_folder(self, run: Wanted) -> Path:
        words = "".join(c if c.isalnum() else "-" for c in run.cell.label.lower())
        return self.folder / RUNS / f"{words}-lr{run.lr:g}-s{run.seed}-{run.key[:10]}"

    def _clear_recorded_runs(self) -> None:
        """A kill between writing a result and removing its run leaves the run behind."""
        if self.keep_runs:
            return
        for run in self.plan.runs():
            result, folder = self.plan.result(run), self._run_folder(run)
            if result is not None and result.error is None and folder.exists():
                shutil.rmtree(folder)


_MEASURED = [
    entry.name
    for entry in dataclasses.fields(Result)
    if entry.name
    not in ("study", "row", "bits", "lr", "seed", "overrides", "config", "data", "machine", "date", "version")
]
