"""The page of a binarized model: what it costs in bits, how far each layer is off, and whether one bell became two."""

from __future__ import annotations

from typing import Any

import numpy as np

from bellbox.report.html import cards, document, figure_with_caption, header, section
from bellbox.report.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, RED, figure, kind_of, styled, to_svg

_REACH = 4.0
_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, MUTED)


def binarized_page(name: str, record: dict[str, Any], bits_per_weight: float, weights: int) -> str:
    """One self-contained HTML page.

    Args:
        name: of the model.
        record: what `bellbox ptq` left in `ptq.json`.
        bits_per_weight: everything stored for the binarized weights.
        weights: number of them.
    """
    settings, blocks = record["settings"], record["blocks"]
    errors = [layer["error"] for block in blocks for layer in block["layers"].values()]
    about = (
        f"{settings['method']} ({settings['variant']}), {settings['samples']} samples of {settings['context']} tokens, "
        f"inputs of {settings['activation_bits']} bits, {sum(block['seconds'] for block in blocks) / 60:.1f} minutes"
    )
    numbers = [
        (
            "bits a weight",
            f"{bits_per_weight:.3f}",
            f"of {weights:,} weights: signs, second bits, scales, all",
        ),
        (
            "error of the outputs",
            f"{sum(errors) / len(errors):.4f}",
            f"mean over layers; worst {max(errors):.4f}",
        ),
    ]
    body = header("Bellbox binarized model", name, [about]) + cards(numbers)
    groups = [group for block in blocks for group in block["groups"]]
    if groups:
        body += section(
            "Single bell, double bell?",
            figure_with_caption(bells(groups), _bells_caption(groups, settings["block"])),
        )
    body += section(
        "Layer by layer",
        figure_with_caption(
            errors_by_block(blocks),
            "Squared error of each layer's outputs on the calibration text, relative to their squares, after the error "
            "of each block of columns was fed to the later ones.",
        ),
    )
    return document(f"{name}: Bellbox binarized model", body)


def _bells_caption(groups: list[dict[str, Any]], block: int) -> str:
    plain, first, last = (
        sum(values) / len(groups)
        for values in (
            [group["loss_untransformed"] for group in groups],
            [group["loss"][0] for group in groups],
            [group["loss"][1] for group in groups],
        )
    )
    return (
        f"Weights behind norms, each as (w - a) / d: a is the mean of its row in its block of {block} columns, d the "
        "mean distance from it. A weight at -1 or +1 (dashed) loses nothing by binarization. Grey: before LTDB; "
        f"colour: after it. LTDB's loss: {plain:.1f} before, {first:.1f} at its start, {last:.1f} learned (mean over "
        "norms). "
        "For weights that are Gaussian within each input channel no scale of channels can bring it below 57.1 (p = 2): "
        "a scale makes the channels' widths alike, and a bell stays a bell."
    )


@styled
def bells(groups: list[dict[str, Any]]) -> str:
    """Histograms of the normalised weights before and after LTDB, summed over the blocks, a panel a norm."""
    norms = list(dict.fromkeys(group["norm"] for group in groups))
    drawn, panels = figure(1, len(norms), 9.6, 3.3, squeeze=False)
    for axes, norm, color in zip(panels[0], norms, _COLORS, strict=False):
        found = [group for group in groups if group["norm"] == norm]
        for key, shade, label in (("bells_before", MUTED, "before"), ("bells_after", color, "after LTDB")):
            counts = np.sum([group[key] for group in found], axis=0, dtype=float)
            width = 2 * _REACH / len(counts)
            centres = np.linspace(-_REACH, _REACH, len(counts) + 1)[:-1] + width / 2
            axes.plot(centres, counts / counts.sum() / width, color=shade, label=label)
        for at in (-1, 1):
            axes.axvline(at, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.set_title(f"behind {norm}, {len(found)} blocks")
        axes.set_xlabel("(w - a) / d")
        axes.set_xlim(-_REACH, _REACH)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right")
    panels[0][0].set_ylabel("density")
    return to_svg(drawn, "Distribution of normalised weights before and after the transformation")


@styled
def errors_by_block(blocks: list[dict[str, Any]]) -> str:
    """Relative error of the outputs by block, a line a layer."""
    drawn, axes = figure(1, 1, 9.6, 3.3)
    names = list(blocks[0]["layers"])
    looks = [(color, line) for line in ("-", (0, (4, 2))) for color in _COLORS]
    for name, (color, line) in zip(names, looks, strict=False):
        values = [block["layers"][name]["error"] for block in blocks]
        axes.plot(
            range(1, len(blocks) + 1),
            values,
            color=color,
            linestyle=line,
            marker="o",
            markersize=3,
            label=kind_of(name),
        )
    axes.set_title("Relative error of the outputs")
    axes.set_xlabel("block")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return to_svg(drawn, "Relative error of each layer's outputs by block")
