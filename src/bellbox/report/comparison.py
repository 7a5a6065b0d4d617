"""Pictures of a comparison: perplexity or accuracy by bits and by bytes, entropy by step, learned scales, features.

Entropy by step and the scales are the BBQ paper's Figures 3 and 7, for whatever methods were compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from bellbox.comparison.grid import bits_text
from bellbox.comparison.summary import Study, Summary
from bellbox.comparison.tables import factor_of, title_of
from bellbox.report.sheet import Picture
from bellbox.report.spectrum import spectrum_picture
from bellbox.report.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    RED,
    figure,
    styled,
    to_svg,
    token_axis,
)

_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, INK)
_LINES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)))
_MARKERS = "osD^vPX"


def comparison_pictures(study: Study) -> list[Picture]:
    """Those pictures of a study that its results can fill."""
    makers = (_by_bits, _by_row, _by_bytes, _entropy_by_step, _gammas, spectrum_picture)
    return [picture for make in makers if (picture := make(study)) is not None]


def _looks(study: Study) -> dict[str, dict[str, Any]]:
    """Row -> colour, line and marker, the same in all pictures of a study."""
    names = dict.fromkeys(s.row for s in study.summaries if not s.full_precision)
    looks = itertools.cycle(itertools.product(_LINES, _COLORS))  # with another marker each time round
    return {
        name: {"color": color, "linestyle": line, "marker": marker}
        for name, (line, color), marker in zip(names, looks, itertools.cycle(_MARKERS), strict=False)
    }


def _low_bit(study: Study) -> list[Summary]:
    return [s for s in study.summaries if not s.full_precision and s.mean is not None]


def _floor(axes: Any, study: Study, draw: str = "axhline") -> None:
    for summary in study.summaries:
        if summary.full_precision and summary.mean is not None:
            getattr(axes, draw)(
                factor_of(study) * summary.mean,
                color=MUTED,
                linestyle=(0, (4, 3)),
                linewidth=1.2,
                label=summary.row,
            )


def _by_row_name(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    rows: dict[str, list[Summary]] = {}
    for summary in summaries:
        rows.setdefault(summary.row, []).append(summary)
    return rows


@styled
def _by_bits(study: Study) -> Picture | None:
    known = [s for s in _low_bit(study) if s.bits is not None]
    widths = sorted({s.bits or 0 for s in known})
    if len(widths) < 2:
        return None
    looks = _looks(study)
    drawn, axes = figure(1, 1, 9.6, 4.2)
    factor = factor_of(study)
    for row, found in _by_row_name(known).items():
        found.sort(key=lambda s: s.bits or 0)
        axes.errorbar(
            [s.bits for s in found], *_heights(found, factor),
            label=row, markersize=5, capsize=3, **looks[row],
        )  # fmt: skip
    _floor(axes, study)
    _judged_axis(axes, study, [s for s in study.summaries if s.bits is not None or s.full_precision])
    alike = all(s.bits == s.activation_bits for s in known)
    axes.set_xlabel("bits of weights and inputs" if alike else "bits of weights")
    axes.set_xticks(widths, list(map(bits_text, widths)))
    axes.set_ylabel(f"validation {title_of(study)}")
    axes.set_title(f"{study.metric.capitalize()} by bits")
    axes.legend(loc="best")
    scale = ", logarithmic; lower is better" if study.metric == "perplexity" else "; higher is better"
    return Picture(
        f"{study.metric}-by-bits",
        f"{study.metric.capitalize()} of each method at each bit width{scale}. Bars are one standard deviation over"
        " seeds; the dashed line is full precision.",
        to_svg(drawn, f"{study.metric.capitalize()} by bits"),
    )


@styled
def _by_row(study: Study) -> Picture | None:
    known = _low_bit(study)
    if not known:
        return None
    looks = _looks(study)
    drawn, axes = figure(1, 1, 9.6, 1.1 + 0.27 * len(known))
    factor = factor_of(study)
    for place, summary in enumerate(known):
        style = looks[summary.row]
        means, deviations = _heights([summary], factor)
        axes.errorbar(
            means, [place], xerr=deviations, color=style["color"], marker=style["marker"],
            markersize=6, capsize=4,
        )  # fmt: skip
        values = [factor * value for value in summary.values.values()]
        axes.plot(values, [place] * len(values), "|", color=style["color"], markersize=9, alpha=0.7)
    _floor(axes, study, "axvline")
    names = [s.row if s.bits is None else f"{s.row}, {bits_text(s.bits)}" for s in known]
    axes.set_yticks(range(len(known)), names)
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlabel(f"validation {title_of(study)}")
    if any(s.full_precision for s in study.summaries):
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0)
    return Picture(
        f"{study.metric}-by-row",
        "Every row and bit width. Ticks are single seeds, the marker is their mean, the bar one standard deviation."
        " Seeds are paired, so which rows are told apart is for the table's differences to say, not for these bars.",
        to_svg(drawn, f"{study.metric.capitalize()} of every row"),
    )


@styled
def _by_bytes(study: Study) -> Picture | None:
    known = [s for s in study.summaries if s.mean is not None and s.block_bytes]
    if len({s.block_bytes for s in known}) < 2:
        return None
    looks = _looks(study)
    drawn, axes = figure(1, 1, 9.6, 4.0)
    factor = factor_of(study)
    for row, found in _by_row_name(known).items():
        style = looks.get(row, {"color": MUTED, "linestyle": "-", "marker": "*"})
        found.sort(key=lambda s: s.block_bytes or 0)
        axes.errorbar(
            [s.block_bytes for s in found], *_heights(found, factor),
            label=row, markersize=6, capsize=3, **style,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = sorted({s.block_bytes or 0 for s in known})
    chosen = [t for i, t in enumerate(ticks) if i == 0 or t / ticks[i - 1] > 1.15]
    axes.set_xticks(chosen, [f"{t / 1024:,.0f} KiB" for t in chosen])
    axes.xaxis.set_minor_locator(_no_ticks())
    _judged_axis(axes, study, known)
    axes.set_xlabel("bytes of the blocks' linear layers and convolutions")
    axes.set_ylabel(f"validation {title_of(study)}")
    axes.set_title(f"{study.metric.capitalize()} against bytes")
    axes.legend(loc="best")
    good = "down" if study.metric == "perplexity" else "up"
    return Picture(
        f"{study.metric}-by-bytes",
        f"What a byte buys: packed size of the layers of the blocks, logarithmic, against {study.metric}."
        f" Further {good} and further left is better.",
        to_svg(drawn, f"{study.metric.capitalize()} against bytes"),
    )


@styled
def _entropy_by_step(study: Study) -> Picture | None:
    known = [s for s in _low_bit(study) if s.bits is not None and s.results]
    known = [s for s in known if len(_points(s, "weight_entropy")) > 1]
    widths = sorted(set(map(_widths, known)))
    if not widths:
        return None
    looks = _looks(study)
    drawn, grid = figure(2, len(widths), 9.6, 4.8, squeeze=False, sharex=True)
    for column, pair in enumerate(widths):
        for axes, field, what, bits in zip(
            grid[:, column],
            ("weight_entropy", "activation_entropy"),
            ("weights", "inputs"),
            pair,
            strict=True,
        ):
            for summary in known:
                points = _points(summary, field) if _widths(summary) == pair else []
                style = {**looks[summary.row], "markersize": 3.5}
                if points:
                    axes.plot(*zip(*points, strict=True), label=summary.row, **style)
            axes.set_title(f"{bits_text(bits)} bits, {what}" if bits else f"{what} in float")
            if bits:
                axes.axhline(bits, color=RED, linestyle=(0, (4, 3)), linewidth=1.1)
                axes.set_ylim(top=bits + 0.02 * bits)
        token_axis(grid[1, column], "images" if study.metric == "accuracy" else "tokens")
    grid[0, 0].set_ylabel("bits per code")
    grid[1, 0].set_ylabel("bits per code")
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    drawn.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    return Picture(
        "entropy-by-step",
        "Entropy of the codes over training, mean of the layers, at each method's best learning rate on the first"
        " seed. The dashed line is the most that a code can carry; a falling line is information lost.",
        to_svg(drawn, "Entropy by step"),
    )


def _widths(summary: Summary) -> tuple[float, float]:
    """Bits of the codes of weights and of inputs; 0 where there are none."""
    return summary.bits or 0, summary.activation_bits or 0


def _points(summary: Summary, field: str) -> list[tuple[float, float]]:
    history = summary.results[0].history
    return [(point["tokens"], point[field]) for point in history if point.get(field) is not None]


@styled
def _gammas(study: Study) -> Picture | None:
    known = [s for s in _low_bit(study) if s.results and s.results[0].gamma]
    if not known:
        return None
    bits = min((s.bits for s in known if s.bits is not None and s.bits >= 2), default=known[0].bits)
    known = [s for s in known if s.bits == bits]
    looks = _looks(study)
    kinds = list(dict.fromkeys(kind for s in known for kind in s.results[0].gamma))
    columns = 4
    rows = -(-(len(kinds) + 1) // columns)
    drawn, grid = figure(rows, columns, 9.6, 1.8 * rows, squeeze=False)
    spots = list(grid.reshape(-1))
    for axes, kind in zip(spots, kinds, strict=False):
        for summary in known:
            histogram = summary.results[0].gamma.get(kind)
            if histogram is not None:
                counts = np.array(histogram["counts"], float)
                edges = np.linspace(histogram["low"], histogram["high"], len(counts) + 1)
                density = counts / counts.sum() / (edges[1] - edges[0])
                color, line = looks[summary.row]["color"], looks[summary.row]["linestyle"]
                axes.stairs(density, edges, color=color, linestyle=line, label=summary.row, linewidth=1.4)
        axes.set_title(kind, fontsize=9.5, pad=4)
        axes.set_yticks([])
    handles, names = spots[0].get_legend_handles_labels()
    spots[len(kinds)].legend(handles, names, loc="center")
    for axes in spots[len(kinds) :]:
        axes.axis("off")
    at = "" if bits is None else f" at {bits_text(bits)} bits"
    return Picture(
        "gamma",
        f"Learned scales of the weight rows{at}, by kind of layer over all blocks, at the end of the first seed's run.",
        to_svg(drawn, "Histograms of the learned row scales"),
    )


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _heights(found: Sequence[Summary], factor: float) -> tuple[list[float], list[float]]:
    """Means and their deviations, as they are shown."""
    return [factor * (s.mean or 0) for s in found], [factor * (s.deviation or 0) for s in found]


def _judged_axis(axes: Any, study: Study, known: Sequence[Summary]) -> None:
    """Of perplexities a logarithmic axis, labelled with plain numbers; of accuracies a plain one."""
    if study.metric == "accuracy":
        return
    axes.set_yscale("log")
    values = [s.mean for s in known if s.mean is not None]
    low, high = 0.96 * min(values), 1.04 * max(values)
    ticks = np.geomspace(low, high, 8)[1:-1]
    axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.yaxis.set_minor_locator(_no_ticks())
    axes.set_ylim(low, high)
