"""The page of a comparison: for each study its table, its pictures, its learning rates."""

from __future__ import annotations

from collections.abc import Sequence

from bellbox.comparison import tables
from bellbox.comparison.summary import Study
from bellbox.report.html import document, figure_with_caption, section, table, text
from bellbox.report.sheet import Picture


def comparison_page(drawn: Sequence[tuple[Study, Sequence[Picture]]]) -> str:
    """One self-contained HTML page.

    Args:
        drawn: studies with their pictures.
    """
    count = sum(len(study.summaries) for study, _ in drawn)
    header = (
        '<header>\n<p class="kicker">Bellbox comparison</p>\n'
        f"<h1>{text(', '.join(study.name for study, _ in drawn))}</h1>\n"
        f'<p class="about">{len(drawn)} {"study" if len(drawn) == 1 else "studies"}, {count} rows</p>\n</header>\n'
    )
    return document("Bellbox comparison", header + "".join(_study(*pair) for pair in drawn))


def _study(study: Study, pictures: Sequence[Picture]) -> str:
    body = table(tables.headings(study), tables.cells(study))
    body += "".join(f'<p class="caption">{text(note)}</p>\n' for note in tables.notes(study))
    body += "".join(figure_with_caption(picture.svg, picture.caption) for picture in pictures)
    if any(len(summary.tried) > 1 for summary in study.summaries):
        body += (
            f"<details open><summary>{tables.rates_title(study)}</summary>"
            f"{table(*tables.rates(study))}</details>\n"
        )
    return section(study.name, body)
