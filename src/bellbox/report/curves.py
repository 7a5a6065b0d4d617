"""Training curves: loss, perplexity, bits per byte, learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np

from bellbox.report.content import ReportInput
from bellbox.report.style import BLUE, GREEN, MUTED, ORANGE, RED, figure, styled, to_svg, token_axis


@styled
def loss_and_bits(content: ReportInput) -> str:
    """Training and validation loss with perplexity on the right; bits per byte with the unigram floor."""
    train, evals = content.record.train, content.record.evals
    drawn, (left, right) = figure(1, 2, 9.6, 3.5)
    if train:
        tokens, loss = _column(train, "tokens"), _column(train, "loss")
        left.plot(tokens, loss, color=BLUE, linewidth=0.9, alpha=0.55, label="training batches")
    if evals:
        tokens, loss = _column(evals, "tokens"), _column(evals, "loss")
        left.plot(tokens, loss, color=ORANGE, marker="o", markersize=4, label="validation, whole split")
    if content.unigram_loss is not None:
        left.axhline(content.unigram_loss, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
        _note(left, content.unigram_loss, "unigram model")
    left.set_title("Loss")
    left.set_ylabel(f"nats per {content.record.unit.removesuffix('s')}")
    token_axis(left, content.record.unit)
    left.legend(loc="best")
    if content.record.is_vision:
        _accuracy(right, evals)
        return to_svg(drawn, "Loss and accuracy against training images")
    low, high = left.get_ylim()
    ticks = [
        p for p in (2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 1e4, 1e5) if low < np.log(p) < high
    ]
    scale = left.secondary_yaxis("right", functions=(np.exp, _log))
    scale.set_yticks(ticks, [f"{p:,.0f}" for p in ticks])
    scale.set_ylabel("perplexity")
    scale.spines["right"].set_visible(False)

    known = [record for record in evals if record.get("bits_per_byte") is not None]
    if known:
        tokens, bits = _column(known, "tokens"), _column(known, "bits_per_byte")
        right.plot(tokens, bits, color=GREEN, marker="o", markersize=4)
        right.annotate(
            f"{bits[-1]:.3f}", (tokens[-1], bits[-1]), xytext=(-4, -13), textcoords="offset points", ha="right",
            fontweight="bold",
        )  # fmt: skip
    if content.unigram_bits_per_byte is not None:
        right.axhline(content.unigram_bits_per_byte, color=RED, linestyle=(0, (4, 3)), linewidth=1.3)
        _note(right, content.unigram_bits_per_byte, f"unigram model, {content.unigram_bits_per_byte:.3f}")
    right.set_title("Bits per byte, validation")
    right.set_ylabel("bits per UTF-8 byte")
    right.margins(y=0.15)
    token_axis(right)
    return to_svg(drawn, "Loss, perplexity and bits per byte against training tokens")


def _accuracy(axes: Any, evals: list[dict[str, Any]]) -> None:
    images, shares = _column(evals, "tokens"), 100 * _column(evals, "accuracy")
    axes.plot(images, shares, color=GREEN, marker="o", markersize=4)
    axes.annotate(
        f"{shares[-1]:.2f} %", (images[-1], shares[-1]), xytext=(-4, -13), textcoords="offset points", ha="right",
        fontweight="bold",
    )  # fmt: skip
    axes.set_title("Accuracy, validation")
    axes.set_ylabel("percent")
    axes.margins(y=0.15)
    token_axis(axes, "images")


@styled
def learning_rate_and_gradient(content: ReportInput) -> str:
    """The schedule and the norm of the gradient before clipping."""
    train = content.record.train
    drawn, (left, right) = figure(1, 2, 9.6, 2.5)
    tokens = _column(train, "tokens")
    left.plot(tokens, _column(train, "lr"), color=BLUE)
    left.set_title("Learning rate")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylim(bottom=0)
    right.plot(tokens, _column(train, "grad_norm"), color=BLUE, linewidth=0.9)
    right.set_title("Norm of the gradient, before clipping")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        token_axis(axes, content.record.unit)
    return to_svg(drawn, "Learning rate and gradient norm against training tokens")


def _column(records: list[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if record.get(name) is None else record[name] for record in records], dtype=float)


def _log(value: Any) -> Any:
    return np.log(np.maximum(value, 1e-300))


def _note(axes: Any, height: float, text: str) -> None:
    """A small label above a horizontal line, at the right end."""
    axes.annotate(
        text, (1, height), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        ha="right", fontsize=8.5,
    )  # fmt: skip
