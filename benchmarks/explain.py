"""The pictures of docs/explanation/bbq.md: docs/figures/rotate.svg, box.svg and cut.svg.

python benchmarks/explain.py            # writes them; the same bytes each time
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import NormalDist

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from bellbox.core.entropy import code_counts, entropy_bits
from bellbox.core.hadamard import butterfly
from bellbox.quantizers import QuantizerSpec, build_quantizer

plt.rcParams["svg.fonttype"] = "none"  # text stays text
plt.rcParams["svg.hashsalt"] = "bellbox"  # the same figures give the same bytes
plt.rcParams["font.size"] = 9

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"
BLUE, ORANGE, GREY = "#0072b2", "#b35900", "#555555"
NORMAL = NormalDist()


def shares(method: str, n: int = 4) -> tuple[list[float], float]:
    """How often each code of a Gaussian row is used, and the bits that a code carries."""
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    quantizer = build_quantizer(QuantizerSpec(method, n, block=1), 4096, rows=64, name="weight")
    quantizer.initialize(weight)
    counts = code_counts(quantizer.codes(weight), n)
    return (counts / counts.sum()).tolist(), entropy_bits(counts)


def rotated() -> Figure:
    """An input with outliers before and after the Hadamard of 128 columns."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=draws) * 0.3
    x[:, ::32] *= 12  # four channels of large values, as language models have them
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), sharey=True)
    grid = np.linspace(-4, 4, 200)
    for axis, values, title in zip(
        axes,
        (x, butterfly(x, 128) / 128**0.5),
        ("as it comes, over its RMS", "rotated, over its RMS"),
        strict=True,
    ):
        normal = (values / values.square().mean(1, keepdim=True).sqrt()).flatten().numpy()
        axis.hist(np.clip(normal, -4, 4), bins=80, range=(-4, 4), density=True, color=BLUE)
        axis.plot(grid, [NORMAL.pdf(v) for v in grid], color=ORANGE, label="standard bell")
        axis.set_title(title, loc="left")
        axis.set_ylim(0, 1.2)
    axes[0].legend(frameon=False)
    return figure


def boxed() -> Figure:
    """The bell, its distribution function, and the box that comes out."""
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.4))
    v = np.linspace(-3, 3, 200)
    axes[0].fill_between(v, [NORMAL.pdf(x) for x in v], color=BLUE, alpha=0.6)
    axes[1].plot(v, [4 * NORMAL.cdf(x) for x in v], color=ORANGE)
    axes[2].fill_between([0, 4], [0.25, 0.25], color=BLUE, alpha=0.6)
    for axis, title in zip(axes, ("v: a bell", "u = 4 Phi(v)", "u: a box, cut in 4"), strict=True):
        axis.set_title(title, loc="left")
    for cut in (1, 2, 3):
        threshold = NORMAL.inv_cdf(cut / 4)
        axes[0].axvline(threshold, color=GREY, linewidth=0.8)
        axes[1].plot([threshold, threshold, -3], [0, cut, cut], color=GREY, linewidth=0.8)
        axes[2].axvline(cut, color=GREY, linewidth=0.8)
    axes[1].set_ylim(0, 4)
    axes[2].set_ylim(0, 0.45)
    return figure


def cut() -> Figure:
    """Shares of the four codes of 2 bits."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4), sharey=True)
    for axis, method in zip(axes, ("bbq", "quest"), strict=True):
        found, bits = shares(method)
        axis.bar(range(4), found, color=BLUE if method == "bbq" else ORANGE)
        axis.set_xticks(range(4), [f"code {code}" for code in range(4)])
        axis.set_title(f"{method}: {bits:.3f} of 2 bits", loc="left")
        axis.axhline(0.25, color=GREY, linewidth=0.8)
    axes[0].set_ylabel("share of Gaussian values")
    return figure


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in (("rotate", rotated()), ("box", boxed()), ("cut", cut())):
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
