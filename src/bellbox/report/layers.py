"""Layer by layer: entropy of the codes, saturation, learned scales."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bellbox.report.content import ReportInput
from bellbox.report.style import BLUE, GREEN, ORANGE, RED, figure, kind_of, short, styled, to_svg, token_axis

DASHED = (0, (4, 3))
_KINDS = ("weight_entropy", "activation_entropy")


@styled
def entropy_over_time(content: ReportInput) -> str:
    """Entropy of weight and activation codes at each validation: layers faint, mean bold, the limit dashed."""
    evals, limit = content.record.evals, _limit(content)
    drawn, pair = figure(1, 2, 9.6, 3.1, sharey=True)
    for axes, field, title, color in zip(
        pair, _KINDS, ("Weights", "Layer inputs"), (BLUE, GREEN), strict=True
    ):
        records = [record for record in evals if record.get(field) and record[field]["layers"]]
        tokens = [record["tokens"] for record in records]
        for number, name in enumerate(records[-1][field]["layers"] if records else ()):
            values = [record[field]["layers"].get(name, math.nan) for record in records]
            label = "each layer" if number == 0 else None
            axes.plot(tokens, values, color=color, alpha=0.3, linewidth=0.9, label=label)
        mean = [record[field]["mean"] for record in records]
        axes.plot(tokens, mean, color=color, linewidth=2.4, marker="o", markersize=4, label="mean")
        _limit_line(axes, limit)
        axes.set_title(f"{title}: entropy of the codes")
        axes.set_ylabel("bits per code")
        token_axis(axes, content.record.unit)
        axes.legend(loc="best")
    return to_svg(drawn, "Entropy of weight codes and of layer input codes against training tokens")


@styled
def entropy_by_layer(content: ReportInput) -> str:
    """Entropy of every layer's codes at the checkpoint, one row a layer."""
    record, limit = content.record.at(content.step) or {}, _limit(content)
    weights, inputs = ((record.get(field) or {"layers": {}})["layers"] for field in _KINDS)
    names = list(weights | inputs)
    drawn, axes = figure(1, 1, 9.6, 0.9 + 0.21 * len(names))
    rows = range(len(names))
    for values, color, label, marker in ((weights, BLUE, "weights", "o"), (inputs, GREEN, "inputs", "D")):
        found = [(values[name], row) for row, name in zip(rows, names, strict=True) if name in values]
        if found:
            axes.scatter(*zip(*found, strict=True), color=color, marker=marker, s=26, label=label, zorder=3)
    axes.axvline(limit, color=RED, linestyle=DASHED, linewidth=1.3, label=f"maximum, {limit:.4g} bits")
    lowest = min([*weights.values(), *inputs.values()], default=limit)
    axes.set_xlim(min(lowest - 0.02 * limit, 0.94 * limit), limit * 1.004)
    axes.set_yticks(rows, [short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("bits per code")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0)
    return to_svg(drawn, "Entropy of the codes of every layer")


@styled
def saturation(content: ReportInput) -> str:
    """Share of codes at either end of the range, over time and by layer."""
    evals = content.record.evals
    even = 2 / content.levels if content.levels else math.nan
    last = (content.record.at(content.step) or {}).get("saturated") or {}
    found = {role: (last.get(role) or {}).get("layers", {}) for role in ("weight", "activation")}
    names = list(found["weight"] | found["activation"])
    drawn, (left, right) = figure(1, 2, 9.6, max(3.0, 0.9 + 0.19 * len(names)), width_ratios=[1, 1.1])
    for role, color, marker in (("weight", BLUE, "o"), ("activation", GREEN, "D")):
        records = [r for r in evals if r.get("saturated", {}).get(role, {}).get("mean") is not None]
        tokens, mean = [r["tokens"] for r in records], [r["saturated"][role]["mean"] for r in records]
        label = {"weight": "weights, mean", "activation": "inputs, mean"}[role]
        left.plot(tokens, mean, color=color, marker=marker, markersize=4, label=label)
        rows = [names.index(name) for name in found[role]]
        right.scatter(list(found[role].values()), rows, color=color, marker=marker, s=22, zorder=3)
    left.axhline(even, color=RED, linestyle=DASHED, linewidth=1.3, label=f"equal use, {even:.3g}")
    right.axvline(even, color=RED, linestyle=DASHED, linewidth=1.3)
    low, high = left.get_ylim()
    left.set_ylim(min(low, even * 0.9), max(high, even * 1.1))
    low, high = right.get_xlim()
    right.set_xlim(min(low, even * 0.9), max(high, even * 1.1))
    left.set_title("Codes at either end: over time")
    left.set_ylabel("share of all codes")
    left.legend(loc="best")
    token_axis(left)
    right.set_title("At the checkpoint, by layer")
    right.set_xlabel("share of the layer's codes")
    right.set_yticks(range(len(names)), [short(name) for name in names])
    right.set_ylim(len(names) - 0.4, -0.6)
    return to_svg(drawn, "Share of saturated codes")


@styled
def gammas(content: ReportInput) -> str:
    """Histograms of the learned row scales by kind of layer, and the scale of every layer input."""
    groups: dict[str, list[np.ndarray]] = {}
    for name, values in content.weight_gamma.items():
        groups.setdefault(kind_of(name), []).append(np.asarray(values, float).reshape(-1))
    columns = 4
    panels = len(groups) + bool(content.activation_gamma)
    rows = -(-panels // columns)
    drawn, grid = figure(rows, columns, 9.6, 1.75 * rows, squeeze=False)
    spots = list(grid.reshape(-1))
    everything = np.concatenate([part for parts in groups.values() for part in parts])
    low, high = np.quantile(everything, [0.002, 0.998])
    margin = 0.05 * (high - low) + 1e-3 * abs(high)
    edges = np.linspace(min(low, everything.min() if margin == 0 else low) - margin, high + margin, 41)
    for axes, (kind, parts) in zip(spots, groups.items(), strict=False):
        values = np.concatenate(parts)
        axes.hist(np.clip(values, edges[0], edges[-1]), bins=edges, color=BLUE, alpha=0.6)
        axes.axvline(values.mean(), color=ORANGE, linewidth=1.6)
        axes.set_title(kind, fontsize=9.5, pad=4)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    if content.activation_gamma:
        axes = spots[len(groups)]
        axes.plot(list(content.activation_gamma.values()), "D", color=GREEN, markersize=4)
        axes.set_title("inputs, first to last", fontsize=9.5, pad=4)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in spots[panels:]:
        axes.set_visible(False)
    return to_svg(drawn, "Learned scales of weights and layer inputs")


def _limit(content: ReportInput) -> float:
    return math.log2(content.levels) if content.levels else math.nan


def _limit_line(axes: Any, limit: float) -> None:
    axes.axhline(limit, color=RED, linestyle=DASHED, linewidth=1.3, label=f"maximum, {limit:.4g} bits")
    low, _ = axes.get_ylim()
    axes.set_ylim(min(low, 0.94 * limit), limit * 1.006)
