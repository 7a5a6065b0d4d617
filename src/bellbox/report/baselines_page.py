"""The page of a table of baselines: a section a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from bellbox.comparison.baselines import table as tables
from bellbox.comparison.baselines.table import Table
from bellbox.report.html import caption, document, header, joined, section, table


def baselines_page(drawn: Sequence[Table]) -> str:
    """One self-contained HTML page."""
    checkpoints = ", ".join(each.model for each in drawn)
    top = header("Bellbox baselines", checkpoints, ["One checkpoint, each method through its own package"])
    return document("Bellbox baselines", joined([top, *map(_section, drawn)]))


def _section(each: Table) -> str:
    notes = joined(map(caption, tables.notes(each)))
    return section(each.model, table(tables.headings(), tables.cells(each)) + notes)
