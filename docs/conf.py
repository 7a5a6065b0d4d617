"""The documentation site: `make docs`, or `python -m sphinx -W -n docs build/site`.

The pages are the Markdown files beside this one, which read in the repository as well. Links from them to files outside
of docs/ become downloads, but for pages of text, which are shown as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import bellbox

HERE = Path(__file__).parent

project = "Bellbox"
author = "the authors of Bellbox"
copyright = "Apache-2.0"
version = release = bellbox.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_static", "figures"]
nitpicky = True
nitpick_ignore_regex = [
    # Other packages' names: their documents are not asked for over the network.
    ("py:.*", r"(torch|nn|numpy|pathlib|collections|transformers|pydantic|typing|os|abc)\b.*"),
    ("py:.*", r"(Tensor|Path|Module|Any|Callable|Iterable|Sequence|Mapping|Literal|optional)"),
    ("py:.*", r"bellbox\.(core|nn|quantizers|convert|formats|inference)\..*"),
    ("py:.*", r"[A-Z]\w*|[a-z]+|dict\[str"),  # short names in signatures, such as a type variable
]
suppress_warnings: list[str] = []

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"  # single backticks in docstrings are code, as in Markdown

html_theme = "furo"
html_title = f"Bellbox {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
highlight_language = "none"

OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(([^):]+?\.md)(?:#[^)]*)?\)")


def download_pages_outside(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links to Markdown outside of docs/ become downloads, as myst makes of other files by itself."""
    folder = (HERE / docname).parent

    def changed(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(HERE) or not target.is_file():
            return link[0]
        return f"{{download}}`{link[1].replace('`', '')} <{link[2]}>`"

    source[0] = OUTSIDE.sub(changed, source[0])


def markdown_in_docstrings(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Our docstrings have blocks of code in fences and items in dashes, as Markdown has."""
    if what in ("attribute", "data", "property"):
        HELD[name], lines[:] = list(lines), ["."]
    inside = False
    for place, line in enumerate(lines):
        bare = line.strip()
        if bare.startswith("```"):
            lines[place] = "" if inside else line.replace(bare, "::")
            lines[place + 1 : place + 1] = [] if inside else [""]
            inside = not inside
        elif inside and bare and not line.startswith("    "):
            lines[place] = f"    {line}"


HELD: dict[str, list[str]] = {}
"""Documentation of fields, kept from napoleon, which reads the words before a colon as a type."""


def fields_as_they_are(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """After napoleon."""
    if name in HELD:
        lines[:] = HELD.pop(name)


def for_screen_readers(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """What scrolls can be reached by keyboard, and headings of the navigation have a level."""
    if "body" in context:
        body = context["body"].replace("<pre>", '<pre tabindex="0">')
        context["body"] = body.replace('<table class="docutils', '<table tabindex="0" class="docutils')
    if "furo_navigation_tree" in context:
        tree = context["furo_navigation_tree"]
        context["furo_navigation_tree"] = tree.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", download_pages_outside)
    app.connect("autodoc-process-docstring", markdown_in_docstrings, priority=100)
    app.connect("autodoc-process-docstring", fields_as_they_are, priority=900)
    app.connect("html-page-context", for_screen_readers, priority=900)
