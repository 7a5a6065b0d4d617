"""The page of a comparison: for each study its table, its pictures, its learning rates."""

from __future__ import annotations

from collections.abc import Sequence

from bellbox.comparison import tables
from bellbox.comparison.summary import Study
from bellbox.report.html import (
    caption,
    details,
    document,
    figure_with_caption,
    header,
    joined,
    section,
    table,
)
from bellbox.report.sheet import Picture


def comparison_page(drawn: Sequence[tuple[Study, Sequence[Picture]]]) -> str:
    """One self-contained HTML page.

    Args:
        drawn: studies with their pictures.
    """
    count = sum(len(study.summaries) for study, _ in drawn)
    about = f"{len(drawn)} {'study' if len(drawn) == 1 else 'studies'}, {count} rows"
    top = header("Bellbox comparison", ", ".join(study.name for study, _ in drawn), [about])
    return document("Bellbox comparison", joined([top, *(_study(*pair) for pair in drawn)]))


def _study(study: Study, pictures: Sequence[Picture]) -> str:
    body = table(tables.headings(study), tables.cells(study))
    body += joined(map(caption, tables.notes(study)))
    body += joined(figure_with_caption(picture.svg, picture.caption) for picture in pictures)
    if any(len(summary.tried) > 1 for summary in study.summaries):
        body += details(tables.rates_title(study), table(*tables.rates(study)))
    return section(study.name, body)
