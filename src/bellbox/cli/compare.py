"""Compare methods: run what is missing of a grid, then draw its tables and pictures.

bellbox compare benchmarks/studies/methods-2bit.yaml --out studies/screen
bellbox compare my-grid.yaml --out studies/mine --jobs 2 --keep-runs
bellbox compare studies/screen --tables
bellbox compare studies/screen --tables --against "BBQ, paper"
bellbox compare my-grid.yaml --out studies/mine --import mine   # rows with methods of your own, from mine.py
bellbox compare --baselines --help                              # GPTQ, AutoRound, HQQ ... on a trained checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bellbox.cli import compare_baselines
from bellbox.cli.output import parse_flags, refuse_flags, write_file
from bellbox.comparison import Grid, Outcome, Results, load_grid, run_grid, summarise, tables
from bellbox.comparison.selection import kept
from bellbox.errors import BellboxError, require
from bellbox.quantizers.own import modules_of
from bellbox.report import comparison_page, comparison_pictures

require("tyro", "cli")
require("scipy", "cli")  # asked for before hours of training, not after them

import tyro  # noqa: E402  (named before, so that its absence is one line; this file is imported by its command only)

_BASELINES = "--baselines"


@dataclass(frozen=True)
class Compare:
    """Compare methods: run what is missing of a grid, then draw its tables and pictures."""

    grid: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="GRID.yaml|FOLDER")]
    """What to compare; with --tables, the folder of an earlier comparison."""
    out: Path | None = None
    """Where results.jsonl lies or shall lie. Runs that it holds are not run again."""
    tables: bool = False
    """Only draw tables and pictures anew from the results in FOLDER."""
    against: str | None = None
    """Row that the tables' differences are to, at the same bits where it has several; without it the grid's `against`,
    or full precision, or the first row."""
    jobs: int = 1
    """Runs at a time, each with the threads that its configuration says."""
    keep_runs: bool = False
    """Leave finished run folders with their checkpoints in the folder; they are removed otherwise."""
    retry: bool = False
    """Try runs again that failed before."""


def main(argv: list[str]) -> None:
    """Run `bellbox compare` with the arguments after that.

    Raises:
        BellboxError: what the user can put right.
        SystemExit: 1 where runs failed, 128 + signal after Ctrl-C or SIGTERM.
    """
    if _BASELINES in argv:
        compare_baselines.main([word for word in argv if word != _BASELINES])
        return
    command = parse_flags(Compare, argv, "bellbox compare", __doc__)
    if command.tables:
        if command.out is not None or not command.grid.is_dir():
            raise BellboxError(
                "--tables takes the folder of an earlier comparison and no --out: compare FOLDER --tables"
            )
        refuse_flags(command, ("jobs", "keep_runs", "retry"), "--tables")
        _draw(command.grid, command.against)
        return
    if command.grid.is_dir():
        raise BellboxError(f"{command.grid}: is a folder; to draw its tables anew, add --tables")
    if command.out is None:
        raise BellboxError("where shall the results go? name a folder: --out FOLDER")
    grid = load_grid(command.grid)
    _refuse_unknown(command.against, grid)
    outcome = run_grid(grid, command.out, jobs=command.jobs, keep_runs=command.keep_runs, retry=command.retry)
    if outcome.done:
        _draw(command.out, command.against)
    _farewell(command, outcome, modules_of(grid.methods))


def _refuse_unknown(against: str | None, grid: Grid) -> None:
    names = dict.fromkeys(cell.row for cell in grid.cells)
    if against is not None and against not in names:
        raise BellboxError(f"--against '{against}': the grid has no such row; there are: {', '.join(names)}")


def _draw(folder: Path, against: str | None) -> None:
    results = Results(folder)
    if not results.all:
        raise BellboxError(f"{results.path}: holds no results yet")
    studies = summarise(results.all, kept(folder), against=against)
    write_file(folder / "tables.md", tables.markdown(studies))
    write_file(folder / "tables.csv", tables.comma_separated(studies))
    write_file(folder / "tables.tex", tables.latex(studies))
    drawn = [(study, comparison_pictures(study)) for study in studies]
    write_file(folder / "comparison.html", comparison_page(drawn))
    for study, pictures in drawn:
        for picture in pictures:
            write_file(folder / "pictures" / f"{study.name}-{picture.name}.svg", picture.standalone)
    print(f"\n{tables.markdown(studies)}")
    print(f"written to {folder}: tables.md, tables.csv, tables.tex, comparison.html, pictures/")


def _farewell(command: Compare, outcome: Outcome, modules: list[str]) -> None:
    again = f"bellbox compare {command.grid} --out {command.out}"
    again += "".join(f" --import {name}" for name in modules)
    if outcome.stopped_by is not None:
        print(f"stopped with {outcome.done} of {outcome.total} runs done; go on with: {again}", flush=True)
        raise SystemExit(128 + outcome.stopped_by)
    if outcome.killed:
        print(f"{outcome.killed} run(s) were killed by something else; go on with: {again}")
    if outcome.failed:
        print(
            f"{outcome.failed} run(s) failed; their logs are in {command.out}/runs; once put right: {again} --retry"
        )
    if outcome.killed or outcome.failed:
        raise SystemExit(1)
