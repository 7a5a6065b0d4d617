"""Ternary baselines that learn nothing (arXiv 2306.17442; formulas reconstructed, see `docs/methods.md`).

Equal support: the range [-m, m], m = max|x|, is cut in three equal parts: thresholds +-m/3, levels 0 and +-2/3 m.
Equal mass: each level gets a third of a Gaussian with the data's RMS s: thresholds +-0.4307 s, levels 0 and +-1.0908 s,
the mean of an outer third. (BBQ with three levels has these codes, after a rotation, and learns what they are worth.)

The gradient passes straight through everywhere.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.quantizers.base import Normaliser, Quantizer
from bellbox.quantizers.spec import Granularity
from bellbox.quantizers.straight_through import straight_through


class _Ternary(Quantizer):
    own_levels: ClassVar[int] = 3
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row", "tensor")
    rescale = True
    worth: ClassVar[float]
    """Of the outer level, in units of what rows are divided by."""

    def _check(self, n: int, zero_point: float | None) -> None:
        if n != 3 or zero_point not in (None, -0.5):
            raise BellboxError(f"{self.method} has 3 levels, -1, 0 and 1: give levels=3 (zero_point -0.5)")

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with the straight-through gradient."""
        assert norm.sigma is not None
        return straight_through(rows, norm, norm.sigma * self.worth, self.levels, self.block, dtype)

    def scale(self) -> Tensor:
        """Of the outer level, in units of what rows are divided by."""
        return torch.tensor(self.worth)


class TernarySupport(_Ternary):
    """Equal support; see `Quantizer` for the arguments."""

    method = "ternary_support"
    measured = "absmax"
    worth = 2 / 3

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """-1, 0, 1 with thresholds at a third."""
        self._check(n, zero_point)
        return Levels.uniform(3, -0.5, 2 / 3)


class TernaryMass(_Ternary):
    """Equal mass; see `Quantizer` for the arguments."""

    method = "ternary_mass"
    worth = 3 * math.exp(-(0.4307272992954576**2) / 2) / math.sqrt(2 * math.pi)

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """-1, 0, 1 with thresholds at the thirds of a Gaussian."""
        self._check(n, zero_point)
        return Levels.gaussian(3, -0.5)
