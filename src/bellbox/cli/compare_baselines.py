"""Baselines that people know beside Bellbox's own methods, on one trained checkpoint, as rows of one table.

bellbox compare --baselines some-hf-folder --calibration fit.txt --text valid.txt --out studies/baselines
bellbox compare --baselines some-hf-folder ... --rows full gptq hqq          # these rows alone
bellbox compare --baselines some-hf-folder ... --packed small-packed         # packed models of the same checkpoint, too
bellbox compare --baselines studies/baselines --tables                       # draw the tables anew

Each row goes through its own package (pip install 'bellbox[baselines]'); one that cannot run here is skipped and says
why. Killed, it goes on with the same command; rows that were skipped are tried again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from bellbox.cli.output import parse_flags, write_file
from bellbox.comparison.baselines import Job, Lines, names, run_baselines
from bellbox.comparison.baselines import table as tables
from bellbox.comparison.baselines.job import Settings
from bellbox.comparison.baselines.lines import TASKS
from bellbox.errors import BellboxError, require
from bellbox.report import baselines_page

require("tyro", "cli")

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)


@dataclass(frozen=True)
class Baselines(Settings):
    """Baselines beside Bellbox's own methods, on one trained checkpoint."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|FOLDER")]
    """A Hugging Face folder or a run in full precision; with --tables, the folder of earlier results."""
    out: Path | None = None
    """Where baselines.jsonl lies or shall lie. Rows that it holds are not measured again."""
    calibration: Path | None = None
    """Text to fit on, for the rows that do."""
    text: Path | None = None
    """Text to score."""
    rows: tuple[str, ...] = ()
    """Which rows; all where not given. A wrong name is answered with a list."""
    packed: tuple[Path, ...] = ()
    """Packed or binarized models of the same tokenizer, as further rows."""
    only: Literal["quality", "speed"] | None = None
    """Perplexity and bytes alone, or tokens a second alone (of which one may want a quiet machine)."""
    threads: int = 1
    """Of torch, in every row."""
    retry: bool = False
    """Try rows again that failed before."""
    tables: bool = False
    """Only draw the tables anew from the results in FOLDER."""


def main(argv: list[str]) -> None:
    """Run `bellbox compare --baselines` with the arguments but for that flag.

    Raises:
        BellboxError: what the user can put right.
    """
    command = parse_flags(Baselines, argv, "bellbox compare --baselines", __doc__)
    if command.tables:
        _draw(command.model)
        return
    job = _job(command)
    rows = [*(command.rows or names()), *(f"packed:{folder.resolve()}" for folder in command.packed)]
    if command.threads < 1:
        raise BellboxError(f"--threads is {command.threads}, must be at least 1")
    torch.set_num_threads(command.threads)
    tasks = TASKS if command.only is None else (command.only,)
    run_baselines(job, rows, tasks=tasks, retry=command.retry, tell=lambda line: print(line, flush=True))
    _draw(Path(job.out))


def _job(command: Baselines) -> Job:
    for name in ("out", "calibration", "text"):
        if getattr(command, name) is None:
            raise BellboxError(
                f"--{name} is missing: bellbox compare --baselines MODEL --calibration FILE --text FILE --out FOLDER"
            )
    paths = {
        name: str(Path(getattr(command, name)).resolve()) for name in ("model", "out", "calibration", "text")
    }
    return Job(**paths, **command.settings()).check()


def _draw(folder: Path) -> None:
    lines = Lines(folder)
    if not lines.all:
        raise BellboxError(f"{lines.path}: holds no results yet")
    drawn = tables.tables_of(lines.all)
    write_file(folder / "baselines.md", tables.markdown(drawn))
    write_file(folder / "baselines.html", baselines_page(drawn))
    print(f"\n{tables.markdown(drawn)}\nwritten to {folder}: baselines.md, baselines.html")
