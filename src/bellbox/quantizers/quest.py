"""QuEST (arXiv 2502.05003): a uniform grid fitted to a Gaussian; the gradient trusts only what was rounded little.

With x_h the rotated row, s its RMS (detached) and a_b the clip of least squared error for a Gaussian at n levels:

    step = 2 a_b s / (n - 1);  x_hat = step * (level of the nearest of n symmetric levels)
    trust: the gradient passes where |x_hat - x_h| <= step / 2: with symmetric levels, |x_h| <= n a_b s / (n - 1)
    clip:  it passes where |x_h| <= 1.3 a_b s (the authors' choice for one bit on both sides)

Ties go up here, where the authors' `round` goes to even.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.core.hadamard import DEFAULT_BLOCK
from bellbox.quantizers.base import Normaliser, Quantizer
from bellbox.quantizers.straight_through import ClipRange, straight_through

CLIPS = {
    2: 0.7978845587,
    3: 1.2240089519,
    4: 1.4935346200,
    8: 2.0510683541,
    16: 2.5139305786,
    32: 2.9160938834,
    64: 3.2765972826,
    256: 3.8849386788,
}
"""The authors' a_b by number of levels."""


@dataclass(frozen=True)
class QuESTOptions:
    """Which gradient rule."""

    rule: Literal["trust", "clip"] = "trust"
    """`trust`, or `clip` at 1.3 times the outermost level."""


@functools.cache
def gaussian_clip(n: int) -> float:
    """The outermost of n uniform symmetric levels that code a standard normal variable with least squared error."""
    if n in CLIPS:
        return CLIPS[n]
    low, high = 0.5, 6.0
    for _ in range(100):  # golden-section search; the error has one minimum
        a, b = high - 0.6180339887498949 * (high - low), low + 0.6180339887498949 * (high - low)
        if gaussian_error(n, a) < gaussian_error(n, b):
            high = b
        else:
            low = a
    return (low + high) / 2


def gaussian_error(n: int, clip: float) -> float:
    """Mean squared error of a standard normal variable rounded to n uniform levels from -clip to clip."""
    step = 2 * clip / (n - 1)
    edges = [-math.inf, *((i - n / 2) * step for i in range(1, n)), math.inf]
    total = 1.0  # E[v^2]; each cell adds q^2 P - 2 q E[v; cell]
    for code in range(n):
        q = (code - (n - 1) / 2) * step
        low, high = edges[code], edges[code + 1]
        total += q * q * (_cdf(high) - _cdf(low)) - 2 * q * (_density(low) - _density(high))
    return total


def _cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


class QuEST(Quantizer):
    """QuEST of one tensor; see `Quantizer` for the arguments. It learns nothing and stores nothing."""

    method = "quest"
    training_options = frozenset({"rule"})
    Options = QuESTOptions
    own_block: ClassVar[int] = DEFAULT_BLOCK
    rescale = True

    options: QuESTOptions

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Symmetric levels unless a zero point is asked for."""
        self.clip = gaussian_clip(n)
        self.step = 2 * self.clip / (n - 1)
        return Levels.uniform(n, -0.5 if zero_point is None else zero_point, self.step)

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with QuEST's gradient."""
        assert norm.sigma is not None
        levels, unit = self.levels, norm.sigma * self.step
        if self.options.rule == "clip":
            clip_range = ClipRange(-1.3 * self.clip, 1.3 * self.clip)
        else:
            low, high = (-levels.offset - 0.5) * self.step, (levels.n - levels.offset - 0.5) * self.step
            clip_range = ClipRange(low, high)
        return straight_through(rows, norm, unit, levels, self.block, dtype, clip_range)

    def scale(self) -> Tensor:
        """The step in units of sigma."""
        return torch.tensor(self.step)
