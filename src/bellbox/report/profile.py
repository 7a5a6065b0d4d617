"""Picture of where the time of a forward goes: a stacked bar a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bellbox.report.style import BLUE, GREEN, MUTED, ORANGE, figure, styled, to_svg

_COLOURS = (BLUE, ORANGE, GREEN, MUTED)


@styled
def profile_picture(bars: Mapping[str, Sequence[float]], classes: Sequence[str], title: str) -> str:
    """SVG of stacked bars.

    Args:
        bars: milliseconds by class, for each model's name.
        classes: names of the classes, in their order; at most four.
        title: above the bars.
    """
    drawn, axes = figure(1, 1, 7.5, 1.5 + 0.42 * len(bars))
    names = list(bars)
    left = [0.0] * len(names)
    for kind, colour, values in zip(classes, _COLOURS, zip(*bars.values(), strict=True), strict=False):
        axes.barh(names, values, left=left, color=colour, label=kind, height=0.62)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds of a forward")
    axes.set_title(title)
    drawn.legend(ncols=len(classes), loc="outside lower center")
    said = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {value:.3g} ms" for kind, value in zip(classes, values, strict=True))
        for name, values in bars.items()
    )
    return to_svg(drawn, f"{title}. {said}")
