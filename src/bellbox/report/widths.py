"""A nested model at each of its widths: how they learned, and what a narrower one costs at the end."""

from __future__ import annotations

from typing import Any

import numpy as np

from bellbox.report.html import table
from bellbox.report.record import RunRecord
from bellbox.report.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, RED, figure, styled, to_svg, token_axis

_COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE)


def widths_of(record: RunRecord) -> list[int]:
    """Bits of the widths of the last validation, the widest first; empty where it has one."""
    last: dict[str, Any] = (record.evals[-1].get("widths") or {}) if record.evals else {}
    return sorted(map(int, last), reverse=True)


@styled
def loss_by_width(record: RunRecord) -> str:
    """Left: validation loss of each width over the training. Right: that of the last validation by its bits."""
    widths = widths_of(record)
    drawn, (left, right) = figure(1, 2, 9.6, 3.2)
    known = [each for each in record.evals if each.get("widths")]
    for place, bits in enumerate(widths):
        having = [each for each in known if str(bits) in each["widths"]]
        tokens = np.array([each["tokens"] for each in having], dtype=float)
        colour = _COLOURS[place % len(_COLOURS)]
        left.plot(tokens, _losses(having, bits), color=colour, marker="o", markersize=4, label=f"{bits} bits")
    left.set_title("Loss at each width, validation")
    left.set_ylabel(f"nats per {record.unit.removesuffix('s')}")
    left.legend(loc="best")
    token_axis(left, record.unit)
    last = np.array([_losses(known[-1:], bits)[0] for bits in widths])
    right.plot(widths, last, color=MUTED, linewidth=1.1)
    for place, (bits, loss) in enumerate(zip(widths, last, strict=True)):
        right.plot([bits], [loss], color=_COLOURS[place % len(_COLOURS)], marker="o", markersize=6)
    right.set_title("Loss at the last validation, by bits")
    right.set_xlabel("bits of weights and inputs")
    right.set_xticks(widths)
    right.margins(x=0.15, y=0.15)
    return to_svg(drawn, "Validation loss of each width over the training, and by bits at its end")


def table_of(record: RunRecord) -> Any:
    """A table of the last validation."""
    judged = "accuracy, %" if record.is_vision else "perplexity"
    found: list[list[str]] = []
    for bits in widths_of(record):
        one = record.evals[-1]["widths"][str(bits)]
        value = one.get("accuracy") if record.is_vision else one.get("perplexity")
        shown = (
            "not finite" if value is None else f"{100 * value:.2f}" if record.is_vision else f"{value:,.2f}"
        )
        entropy = (one.get("weight_entropy") or {}).get("mean")
        found.append([f"{bits} bits", shown, "-" if entropy is None else f"{entropy:.3f}"])
    return table(["width", judged, "weight entropy"], found)


def _losses(records: list[dict[str, Any]], bits: int) -> np.ndarray:
    given = [each["widths"][str(bits)].get("loss") for each in records]
    return np.array([np.nan if loss is None else loss for loss in given], dtype=float)
