"""The method in three pictures, from real weights: the bell, the box, the codes (the BBQ paper's Figure 1)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bellbox.report.content import LayerValues
from bellbox.report.style import BLUE, GREEN, MUTED, ORANGE, RED, figure, styled, to_svg

_REACH = 3.6  # standard deviations shown on either side


@styled
def bell_box_codes(layer: LayerValues) -> str:
    """Histograms of the normalised weights, of their probability integral transform, and of the codes."""
    n = len(layer.integers)
    drawn, (bell, box, codes) = figure(1, 3, 9.6, 3.3)
    _bell(bell, layer)
    _box(box, layer, n)
    _codes(codes, layer, n)
    return to_svg(drawn, f"Bell, box and codes of {layer.name}")


def _bell(axes: Any, layer: LayerValues) -> None:
    values = layer.normalised.reshape(-1)
    axes.hist(values, bins=np.linspace(-_REACH, _REACH, 81), density=True, color=BLUE, alpha=0.55)
    x = np.linspace(-_REACH, _REACH, 241)
    axes.plot(x, np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), color=ORANGE, label="N(0, 1)")
    for number, threshold in enumerate(layer.thresholds):
        label = "thresholds" if number == 0 else None
        axes.axvline(threshold, color=RED, linestyle=(0, (3, 2)), linewidth=1.1, label=label)
    axes.set_title("1 · The bell: v")
    axes.set_xlabel("normalised weight v")
    axes.set_ylabel("density")
    axes.set_xlim(-_REACH, _REACH)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
    axes.legend(loc="upper right", handlelength=1.4, borderaxespad=0)


def _box(axes: Any, layer: LayerValues, n: int) -> None:
    box = n * normal_cdf(layer.normalised.reshape(-1))
    axes.hist(box, bins=np.linspace(0, n, 65), density=True, color=BLUE, alpha=0.55)
    axes.axhline(1 / n, color=ORANGE, label="uniform")
    for edge in range(1, n):
        axes.axvline(edge, color=RED, linestyle=(0, (3, 2)), linewidth=1.1)
    axes.set_title(f"2 · The box: u = {n} Φ(v)")
    axes.set_xlabel("u, cut at the whole numbers")
    axes.set_xlim(0, n)
    axes.set_ylim(top=axes.get_ylim()[1] * 1.2)
    axes.legend(loc="upper right", handlelength=1.4, borderaxespad=0)


def _codes(axes: Any, layer: LayerValues, n: int) -> None:
    counts = np.bincount(layer.codes.reshape(-1), minlength=n)
    share = counts / counts.sum()
    axes.bar(range(n), share, color=GREEN, alpha=0.7, width=0.8)
    axes.axhline(1 / n, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    if n <= 8:
        for code, height in enumerate(share):
            axes.annotate(
                f"{100 * height:.1f}%", (code, height), xytext=(0, 3), textcoords="offset points", ha="center",
                fontsize=8.5,
            )  # fmt: skip
        axes.set_xticks(range(n), [f"{code}\n({value:+d})" for code, value in enumerate(layer.integers)])
    axes.grid(visible=False, axis="x")
    axes.set_title(f"3 · The codes: {entropy(counts):.3f} of {math.log2(n):.4g} bits")
    axes.set_xlabel("code (its integer)")
    axes.set_ylabel("share")
    axes.set_ylim(0, max(share.max(), 1 / n) * 1.25)


def entropy(counts: np.ndarray) -> float:
    """Shannon entropy of counts, bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def normal_cdf(values: np.ndarray) -> np.ndarray:
    """Phi: for a picture only; codes are decided by thresholds."""
    # Interpolated on a fine grid, good to 1e-7: numpy has no erf, and a histogram does not see the difference.
    grid = np.linspace(-8, 8, 32001)
    table = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in grid])
    return np.interp(values, grid, table)
