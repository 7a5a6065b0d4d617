"""The lines as tables, one a checkpoint: its rows, and what one must know to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bellbox.comparison.baselines.lines import Line
from bellbox.comparison.baselines.registry import names
from bellbox.comparison.grid import bits_text
from bellbox.comparison.tables import markdown_table

_NONE = "-"


@dataclass(frozen=True)
class Row:
    """One row of a table: the last measurements of each kind."""

    line: Line
    """Any of them, for what they share."""
    quality: Line | None
    speed: Line | None

    def reasons(self) -> list[str]:
        """Why it has no numbers."""
        asked = [line for line in (self.quality, self.speed) if line is not None]
        found = [f"skipped: {line.skipped}" for line in asked if line.skipped]
        found += [f"{line.task} failed: {line.error}" for line in asked if line.error]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Table:
    """All rows of one checkpoint."""

    model: str
    rows: list[Row]

    @property
    def full(self) -> float | None:
        """Perplexity in full precision."""
        of = (row for row in self.rows if row.line.row == "full")
        return next((number for row in of if (number := _found(row.quality, "perplexity"))), None)


def tables_of(lines: Sequence[Line]) -> list[Table]:
    """One a checkpoint, rows in the order of the registry, models that the user gave last.

    A checkpoint's rows are those of its last settings: numbers of another text or rounding do not compare.
    """
    tables: list[Table] = []
    for model in dict.fromkeys(line.model for line in lines):
        ours = [line for line in lines if line.model == model]
        ours = [line for line in ours if line.settings == ours[-1].settings]
        known = [*names(), *sorted({line.row for line in ours} - set(names()))]
        rows = [_row([line for line in ours if line.row == name]) for name in known]
        tables.append(Table(model, [row for row in rows if row is not None]))
    return tables


def _row(lines: list[Line]) -> Row | None:
    last = {line.task: line for line in lines}
    return Row(lines[-1], last.get("quality"), last.get("speed")) if lines else None


def _found(line: Line | None, name: str) -> float | None:
    return None if line is None else line.found.get(name)


def _number(line: Line | None, name: str, form: str) -> str:
    value = _found(line, name)
    return _NONE if value is None else format(value, form)


def _perplexity(row: Row) -> str:
    if row.quality is not None and not row.quality.found:
        return "skipped" if row.quality.skipped else "failed"
    left = (
        "†" if row.quality is not None and row.line.bits is not None and row.quality.found.get("left") else ""
    )
    return _number(row.quality, "perplexity", ",.2f") + left


def _ratio(row: Row, full: float | None) -> str:
    value = _found(row.quality, "perplexity")
    return _NONE if value is None or full is None else f"{value / full:,.3f}"


def _spread(row: Row) -> str:
    quartiles = None if row.speed is None else row.speed.found.get("quartiles")
    return _NONE if quartiles is None else f"{quartiles[0]:.1f} to {quartiles[1]:.1f}"


def _columns(full: float | None) -> tuple[tuple[str, Callable[[Row], str]], ...]:
    return (
        ("method", lambda r: r.line.title),
        ("package", lambda r: " ".join(filter(None, (r.line.package, r.line.package_version)))),
        ("bits", lambda r: _NONE if r.line.bits is None else bits_text(r.line.bits)),
        ("perplexity", _perplexity),
        ("of full precision", lambda r: _ratio(r, full)),
        ("bytes", lambda r: _number(r.quality, "bytes", ",")),
        ("bits a weight", lambda r: _number(r.quality, "bits_per_weight", ".2f")),
        ("tokens/s", lambda r: _number(r.speed, "tokens_per_second", ".1f")),
        ("quartiles", _spread),
        ("x full precision", lambda r: _number(r.speed, "times_full", ".2f")),
    )


def headings() -> list[str]:
    """Of the columns."""
    return [name for name, _ in _columns(None)]


def cells(table: Table) -> list[list[str]]:
    """A table's rows as text, under `headings`."""
    return [[text(row) for _, text in _columns(table.full)] for row in table.rows]


def notes(table: Table) -> list[str]:
    """What one must know to read a table, a sentence each."""
    settings = table.rows[-1].line.settings
    found = [
        f"All rows start from the checkpoint in {settings['dtype']}, and compute in fp32 outside the packages' own "
        "layers.",
        f"Perplexity by Bellbox: {_protocol(table)}. Fitted, where a row is, on {settings['samples']} samples of "
        f"{settings['context']} tokens; groups of {settings['group']}; AutoRound {settings['iterations']} steps a "
        "block.",
        "Bytes: all files of the saved model but its tokenizer, embeddings and head included; bits a weight: those "
        "over all weights of the checkpoint, a tied head counted once.",
        *_timing(table),
    ]
    found += [
        f"† {row.line.title} left {_left(row)} in full precision."
        for row in table.rows
        if "†" in _perplexity(row)
    ]
    found += [
        f"{row.line.title} ({row.line.package}): {reason}." for row in table.rows for reason in row.reasons()
    ]
    return [*found, _measured(table)]


def _protocol(table: Table) -> str:
    of = (row.quality.found.get("protocol") for row in table.rows if row.quality is not None)
    return next((text for text in of if text), "not measured")


def _left(row: Row) -> str:
    left = row.quality.found["left"] if row.quality is not None else []
    kinds = sorted({name.rsplit(".", 1)[-1] for name in left})
    return f"{len(left)} layers ({', '.join(kinds)})"


def _timing(table: Table) -> list[str]:
    speeds = [row.speed for row in table.rows if row.speed is not None and row.speed.found]
    if not speeds:
        return []
    threads, load = {line.found["threads"] for line in speeds}, max(line.found["load"] for line in speeds)
    return [
        "Tokens/s: greedy decoding of one sequence, median; each row in turns with full precision in transformers, "
        "both warmed up, and the last column compares those turns. "
        f"Threads: {', '.join(map(str, sorted(threads)))}; load of the machine up to {load:.1f}."
    ]


def _measured(table: Table) -> str:
    lines = [row.line for row in table.rows]
    several = (
        sorted({read(line) for line in lines}) for read in (lambda x: x.date, _machine, lambda x: x.version)
    )
    dates, machines, versions = ("; ".join(each) for each in several)
    return f"Measured {dates} on {machines}; Bellbox {versions}."


def _machine(line: Line) -> str:
    return f"{line.machine['cpu']}, {line.machine['cpu_count']} cores, torch {line.machine['torch']}"


def markdown(tables: Sequence[Table]) -> str:
    """All tables, each with its notes."""
    parts: list[str] = []
    for table in tables:
        parts.append(f"## {table.model}\n\n" + markdown_table(headings(), cells(table)))
        parts.append("\n".join(f"- {note}" for note in notes(table)) + "\n")
    return "\n".join(parts)
