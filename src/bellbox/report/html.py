"""The parts of a page, of which each is a macro of `templates/parts.html`; a page loads nothing.

What a part is given is escaped by Jinja, unless another part made it: a `Markup`. So a name from somebody's file cannot
become a tag, wherever it is put.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bellbox.errors import require
from bellbox.report.sheet import STYLE

if TYPE_CHECKING:
    from markupsafe import Markup


@functools.cache
def _parts() -> Any:
    jinja2 = require("jinja2", "cli")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bellbox.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("parts.html").module


def made(markup: str) -> Markup:
    """Text that is markup already, such as a picture of ours."""
    return require("markupsafe", "cli").Markup(markup)


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Parts one after the other."""
    return made(between).join(parts)


def document(title: str, body: str) -> str:
    """A whole page; it follows the reader's light or dark setting, and prints on white."""
    return str(_parts().document(title, made(STYLE), body))


def header(kicker: str, title: str, about: Sequence[str]) -> Markup:
    """What the page is of, and lines about it."""
    return _parts().header(kicker, title, about)


def cards(found: Iterable[tuple[str, str, str]]) -> Markup:
    """Headline numbers: label, value and note of each."""
    return _parts().cards(list(found))


def section(title: str, body: str) -> Markup:
    """A heading and what stands under it."""
    return _parts().section(title, body)


def figure_with_caption(svg: str, caption: str) -> Markup:
    """A picture of ours and what to see in it."""
    return _parts().figure(made(svg), caption)


def caption(words: str) -> Markup:
    """A paragraph under a table or a picture."""
    return _parts().caption(words)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column names its rows; it scrolls by itself where the page is narrow."""
    return _parts().table(headings, rows)


def sizes(rows: Iterable[tuple[str, Sequence[str], str, str]]) -> Markup:
    """A table of sizes: of each part its name, its cells, and the lengths of its two bars in per cent."""
    return _parts().sizes(list(rows))


def agreement(tokens: str, what: str, codes: str, mismatches: str, difference: str, meaning: str) -> Markup:
    """What comparing the packed with the trained model gave."""
    return _parts().agreement(tokens, what, codes, mismatches, difference, meaning)


def sample(prompt: str, continuation: str) -> Markup:
    """A prompt, and what the model wrote, line by line."""
    return _parts().sample(prompt, continuation.split("\n"))


def facts(rows: Iterable[tuple[str, str]]) -> Markup:
    """Names and values; nothing where there are none."""
    return _parts().facts(list(rows))


def preformatted(words: str) -> Markup:
    """Text with its line breaks."""
    return _parts().preformatted(words)


def details(summary: str, body: str) -> Markup:
    """What a reader may fold away."""
    return _parts().details(summary, body)
