"""Spectrum of a network's features: of a run at its validations, and of a study with and without MEC.

Shares are the eigenvalues of the features' covariance over their sum, the largest first, as
`bellbox.objectives.spectrum` gives them. What one number can say of them is the effective dimension, the exponential
of their entropy: d where all d are equal, 1 where a single direction has everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bellbox.comparison.summary import Study, Summary, apart_from_mec
from bellbox.report.record import RunRecord
from bellbox.report.sheet import Picture
from bellbox.report.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, RED, figure, styled, to_svg

_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE)
_LOWEST = 1e-5
_COLUMNS = 3


def effective_dimension(shares: Sequence[float]) -> float:
    """exp of the entropy of shares, which are scaled to sum up to 1."""
    found = np.asarray(shares, float)
    found = found[found > 0] / found.sum()
    return float(np.exp(-(found * np.log(found)).sum()))


def spectra_of(record: RunRecord) -> list[tuple[int, list[float]]]:
    """Step and shares of each validation that has them."""
    return [(each["step"], each["feature_spectrum"]) for each in record.evals if each.get("feature_spectrum")]


@styled
def features_over_time(record: RunRecord) -> str:
    """The spectrum at up to four validations, and the effective dimension at all of them."""
    found = spectra_of(record)
    places = sorted({round(i * (len(found) - 1) / 3) for i in range(4)})
    drawn, (left, right) = figure(1, 2, 9.6, 3.3)
    for number, place in enumerate(places):
        step, shares = found[place]
        faint = 0.3 + 0.7 * (number + 1) / len(places)
        _line(left, shares, color=BLUE, alpha=faint, label=f"step {step:,}")
    _frame(left, len(found[-1][1]))
    left.set_title("Spectrum of the features")
    left.legend(loc="best")
    dimensions = [effective_dimension(shares) for _, shares in found]
    right.plot([step for step, _ in found], dimensions, color=GREEN, marker="o", markersize=4)
    right.annotate(
        f"{dimensions[-1]:.1f}", (found[-1][0], dimensions[-1]), xytext=(-4, 6), textcoords="offset points",
        ha="right", fontweight="bold",
    )  # fmt: skip
    right.set_title(f"Effective dimension, of {len(found[-1][1])}")
    right.set_xlabel("step")
    right.set_ylim(bottom=0)
    right.margins(y=0.15)
    return to_svg(drawn, "Spectrum of the features and their effective dimension")


@styled
def spectrum_picture(study: Study) -> Picture | None:
    """Rows that differ in their MEC term over each other, a panel each; without such rows, all at one bit width."""
    panels = _panels([s for s in study.summaries if _mean_shares(s)])
    if not panels:
        return None
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    drawn, grid = figure(lines, columns, 9.6, 0.6 + 2.6 * lines, squeeze=False, sharey=True)
    spots = list(grid.reshape(-1))
    for axes, (title, entries) in zip(spots, panels, strict=False):
        for (name, summary), color in zip(entries, _COLORS * len(entries), strict=False):
            shares = _mean_shares(summary)
            dimension = effective_dimension(shares)
            _line(axes, shares, color=color, label=f"{name}: {dimension:.1f}")
        _frame(axes, max(len(_mean_shares(summary)) for _, summary in entries))
        axes.set_title(title, fontsize=9.5, pad=4)
        axes.legend(loc="best", fontsize=8)
    for axes in spots[len(panels) :]:
        axes.axis("off")
    return Picture(
        "feature-spectrum",
        "How the validation features that a MEC term sees (or would see) spread over directions: share of the variance"
        " in each, the largest first, logarithmic; mean over seeds. The flatter the line, the more directions carry"
        " something; the dashed line is an even spread. Numbers are effective dimensions, the exponential of the"
        " shares' entropy.",
        to_svg(drawn, "Spectrum of the features"),
    )


def _panels(known: list[Summary]) -> list[tuple[str, list[tuple[str, Summary]]]]:
    families: dict[str, list[Summary]] = {}
    for summary in known:
        families.setdefault(apart_from_mec(summary.results[0].config), []).append(summary)
    paired = [sorted(family, key=_weight) for family in families.values() if any(map(_weight, family))]
    paired = [family for family in paired if len(family) > 1]
    if paired:
        return [(_name(f[0]), [(_term(one), one) for one in f]) for f in paired]
    widths = sorted({s.bits for s in known if s.bits is not None})
    groups = [
        (f"{width:.3g} bits", [(s.row, s) for s in known if s.bits == width or s.full_precision])
        for width in widths
    ]
    return groups or ([("features", [(s.row, s) for s in known])] if known else [])


def _weight(summary: Summary) -> float:
    return float((summary.results[0].config.get("mec") or {}).get("weight", 0.0))


def _term(summary: Summary) -> str:
    weight = _weight(summary)
    return f"MEC {weight:g}" if weight else "without"


def _name(summary: Summary) -> str:
    return summary.row if summary.bits is None else f"{summary.row}, {summary.bits:.3g} bits"


def _mean_shares(summary: Summary) -> list[float]:
    found = [result.feature_spectrum for result in summary.results if result.feature_spectrum]
    found = [shares for shares in found if len(shares) == len(found[0])]
    return np.mean(found, axis=0).tolist() if found else []


def _line(axes: Any, shares: Sequence[float], **looks: Any) -> None:
    heights = [share if share > 0 else np.nan for share in shares]
    axes.plot(range(1, len(shares) + 1), heights, linewidth=1.5, **looks)


def _frame(axes: Any, dimension: int) -> None:
    axes.axhline(1 / dimension, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
    axes.set_yscale("log")
    axes.set_ylim(_LOWEST, 1)
    axes.set_xlabel("direction")
    axes.set_ylabel("share of the variance")
