"""The bones of a page: one string of HTML that loads nothing, with sections, figures and escaped text."""

from __future__ import annotations

import html

from bellbox.report.sheet import STYLE


def document(title: str, body: str) -> str:
    """A whole page; it follows the reader's light or dark setting, and prints on white."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def section(title: str, body: str) -> str:
    """A heading and what stands under it."""
    return f"<section>\n<h2>{text(title)}</h2>\n{body}</section>\n"


def figure_with_caption(svg: str, caption: str) -> str:
    """A picture and what to see in it."""
    return f"<figure>\n{svg}\n<figcaption>{text(caption)}</figcaption>\n</figure>\n"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A table whose first column names its rows; it scrolls by itself where the page is narrow."""
    head = "".join(f"<th>{text(name)}</th>" for name in headings)
    body = "".join(
        f'<tr><th scope="row">{text(line[0])}</th>{"".join(f"<td>{text(cell)}</td>" for cell in line[1:])}</tr>'
        for line in rows
    )
    whole = f'<table class="sizes"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{whole}</div>\n'


def text(value: str) -> str:
    """Escaped, for content and attributes alike."""
    return html.escape(value, quote=True)
