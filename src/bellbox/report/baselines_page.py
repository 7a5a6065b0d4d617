"""The page of a table of baselines: a section a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from bellbox.comparison.baselines import table as tables
from bellbox.comparison.baselines.table import Table
from bellbox.report.html import document, section, table, text


def baselines_page(drawn: Sequence[Table]) -> str:
    """One self-contained HTML page."""
    header = (
        '<header>\n<p class="kicker">Bellbox baselines</p>\n'
        f"<h1>{text(', '.join(each.model for each in drawn))}</h1>\n"
        '<p class="about">One checkpoint, each method through its own package</p>\n</header>\n'
    )
    return document("Bellbox baselines", header + "".join(map(_section, drawn)))


def _section(each: Table) -> str:
    notes = "".join(f'<p class="caption">{text(note)}</p>\n' for note in tables.notes(each))
    return section(each.model, table(tables.headings(), tables.cells(each)) + notes)
