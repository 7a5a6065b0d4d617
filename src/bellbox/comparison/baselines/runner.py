"""Running what is missing of a table: one process a row and task, so that a crash costs one cell at most."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bellbox.comparison.baselines.baseline import Baseline
from bellbox.comparison.baselines.job import JOB, Job, key_of, made_identity, prepare_job
from bellbox.comparison.baselines.lines import TASKS, Line, Lines, Task
from bellbox.comparison.baselines.own import FULL, FULL_BELLBOX
from bellbox.comparison.baselines.registry import baseline_of
from bellbox.comparison.baselines.worker import MADE
from bellbox.runs.environment import describe
from bellbox.utils.files import lock, read_json

LOGS = "logs"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Wanted:
    """One cell of the table to be: a row, and what is measured of it."""

    row: Baseline
    name: str
    task: Task
    key: str
    folder: Path
    """Of its model."""


def run_baselines(
    job: Job,
    rows: Sequence[str],
    *,
    tasks: Sequence[Task] = TASKS,
    retry: bool = False,
    tell: Progress = print,
) -> list[Line]:
    """Measure the rows that `baselines.jsonl` has no numbers of yet; those that were skipped are tried again.

    Args:
        job: the checkpoint and the settings.
        rows: names, as `baseline_of` takes them.
        tasks: what to measure.
        retry: try rows again that failed, too.
        tell: called with a line for each row.

    Returns:
        the lines that were added.

    Raises:
        BellboxError: no such model, row or text, or another process works in the folder.
    """
    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out, "measuring in"):
        lines, identity = Lines(out), prepare_job(job)
        asked = list(
            _wanted(job, rows, tasks, identity)
        )  # all, so that a wrong one is refused before any runs
        added: list[Line] = []
        for wanted in asked:
            known = lines.find(wanted.key)
            if known is not None and known.skipped is None and (known.error is None or not retry):
                continue
            line = _line(job, wanted, identity, _measured(job, wanted))
            lines.add(line)
            added.append(line)
            tell(told(line))
        return added


def _wanted(
    job: Job, rows: Sequence[str], tasks: Sequence[Task], identity: dict[str, Any]
) -> Iterator[_Wanted]:
    timed = {"new_tokens": job.new_tokens, "threads": torch.get_num_threads()}
    for name in rows:
        row = baseline_of(name, job)
        for task in tasks:
            decide = identity if task == "quality" else {**identity, **timed}
            key = key_of(decide, row.name, task, row.version)
            yield _Wanted(row, name, task, key, _folder(job, row, identity))


def told(line: Line) -> str:
    """A line for the user."""
    if line.skipped or line.error:
        return f"{line.row}: {'skipped' if line.skipped else 'failed'}: {line.skipped or line.error}"
    found = line.found
    if line.task == "quality":
        return f"{line.row}: perplexity {found['perplexity']:.3f}, {found['bytes']:,} bytes"
    return (
        f"{line.row}: {found['tokens_per_second']:.1f} tokens/s, {found['times_full']:.2f} x full precision"
    )


def _measured(job: Job, wanted: _Wanted) -> dict[str, Any]:
    """`found`, or `skipped` or `error`, from a process of its own."""
    reason = wanted.row.absent()
    if reason is not None:
        return {"skipped": reason}
    folder, logs = wanted.folder, job.folder / LOGS
    if not folder.with_name(folder.name + MADE).is_file() and folder.parent.name == "rows":
        shutil.rmtree(folder, ignore_errors=True)  # half a model that a kill left
    logs.mkdir(exist_ok=True)
    out, log = logs / "found.json", logs / f"{wanted.row.name.replace(':', '-')}-{wanted.task}.txt"
    out.unlink(missing_ok=True)
    command = [
        "-m",
        "bellbox.comparison.baselines.worker",
        job.folder / JOB,
        wanted.name,
        wanted.task,
        folder,
        out,
    ]
    with log.open("wb") as file:
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        status = subprocess.run(
            [sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **threads}, cwd=job.folder, check=False,
        ).returncode  # fmt: skip
    if out.is_file():
        return read_json(out)
    return {"error": f"its process ended with status {status}; see {log}"}


def _folder(job: Job, row: Baseline, identity: dict[str, Any]) -> Path:
    """Where the row's model lies, or shall lie; of another package's version or settings, elsewhere."""
    if row.made is not None:
        return row.made
    if row in (FULL, FULL_BELLBOX):
        return job.checkpoint
    return (
        job.folder
        / "rows"
        / f"{row.name}-{key_of(made_identity(identity), row.name, 'made', row.version)[:10]}"
    )


def _line(job: Job, wanted: _Wanted, identity: dict[str, Any], measured: dict[str, Any]) -> Line:
    environment = describe(torch.device("cpu"))
    machine = {key: environment[key] for key in ("cpu", "cpu_count", "torch", "kernels", "threads")}
    revision = environment["git"]
    row = wanted.row
    return Line(
        model=job.name,
        row=row.name,
        title=row.title,
        task=wanted.task,
        key=wanted.key,
        bits=None if row.bits is None else float(row.bits),
        package=row.package,
        package_version=row.version,
        settings=identity,
        machine=machine,
        date=datetime.date.today().isoformat(),
        version=environment["bellbox"] + (f", {revision['revision'][:10]}" if revision else ""),
        **measured,
    )
