"""Style of the pictures: one palette, one frame, SVG that takes its colours from the page.

Figures are drawn with marker colours that no plot would use by chance; `to_svg` replaces them by the page's
CSS variables, so that the same picture is right on light, on dark and on paper. The palette is Okabe and Ito's
(distinguishable with any colour vision), a little lighter on dark.
"""

from __future__ import annotations

import functools
import html
import io
import itertools
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from bellbox.errors import require

INK, MUTED, GRID, PAPER = "#010203", "#040506", "#070809", "#0a0b0c"
BLUE, ORANGE, GREEN, RED, PURPLE = "#0d0e0f", "#101112", "#131415", "#161718", "#191a1b"
VARIABLES = {
    INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper",
    BLUE: "blue", ORANGE: "orange", GREEN: "green", RED: "red", PURPLE: "purple",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_RC = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlecolor": INK,
    "axes.labelsize": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a row's name is no formula
    "font.size": 9.5,
}
_numbers = itertools.count(1)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def styled(draw: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Draw in this style: matplotlib reads its settings when a title or a line is made, not before."""

    @functools.wraps(draw)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with require("matplotlib", "cli").rc_context({**_RC, "svg.hashsalt": "bellbox"}):
            return draw(*args, **kwargs)

    return wrapped


def figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A matplotlib figure, never shown on a screen; to be called within `styled`.

    Args:
        rows: of axes.
        columns: of axes.
        width: inches.
        height: inches.
        **options: for `Figure.subplots`.

    Returns:
        The figure, and its axes as `Figure.subplots` gives them.
    """
    drawn = require("matplotlib.figure", "cli").Figure(figsize=(width, height), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.05, hspace=0.06)
    return drawn, drawn.subplots(rows, columns, **options)


def to_svg(drawn: Any, description: str) -> str:
    """A figure as an `<svg>` element for an HTML page, coloured by the page's variables.

    Args:
        drawn: what `figure` gave.
        description: said to those who cannot see it.
    """
    buffer = io.StringIO()
    prefix = f"f{next(_numbers)}-"
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    opening = re.search(r'viewBox="[^"]*"', text)
    box = opening.group(0) if opening else ""
    label = html.escape(description, quote=True)
    text = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{label}">', text, count=1)
    text = text.replace("xlink:href", "href")
    # Ids are unique within a figure only, and a page has many.
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: match.group(1) + prefix, text)
    for marker, variable in VARIABLES.items():
        text = text.replace(marker, f"var(--{variable})")
    return re.sub(
        r"font: ([\d.]+)px [^;\"]*", rf"font-size: \1px; font-family: {FONT}".replace("'", ""), text
    )


def millions(value: float, _position: object = None) -> str:
    """An axis label for a number of tokens: 250k, 1.5M, 3B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def token_axis(axes: Any, unit: str = "tokens") -> None:
    """Label the x axis as training tokens, or images."""
    axes.set_xlabel(f"training {unit}")
    axes.xaxis.set_major_formatter(millions)
    axes.set_xlim(left=0)


def short(name: str) -> str:
    """A layer's name without what all of them share: `0.mlp.down_proj` of `model.layers.0.mlp.down_proj`."""
    match = re.search(r"(?:^|\.)(\d+\..*)$", name)
    return (match.group(1) if match else name).removesuffix("_proj")


def kind_of(name: str) -> str:
    """What a layer is, whichever block it sits in: `mlp.down` of `model.layers.0.mlp.down_proj`."""
    return re.sub(r"^\d+\.", "", short(name))
