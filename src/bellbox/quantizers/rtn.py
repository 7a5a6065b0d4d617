"""Round to nearest, by the largest magnitude: what every method has to beat, and 8-bit activations.

Per row, with m = max|x| (detached): n levels evenly from -m to m, the nearest one is taken (a tie goes up). Nothing is
ever clipped, so the gradient passes everywhere. An odd n has a level at zero: 255 levels are the usual int8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.quantizers.base import Normaliser, Quantizer
from bellbox.quantizers.straight_through import straight_through


class RTN(Quantizer):
    """Round to nearest of one tensor; see `Quantizer` for the arguments. It learns nothing and stores nothing."""

    method = "rtn"
    measured = "absmax"
    rescale = True

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Symmetric levels unless a zero point is asked for."""
        return Levels.uniform(n, -0.5 if zero_point is None else zero_point, 2 / (n - 1))

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with the straight-through gradient."""
        assert norm.sigma is not None
        unit = norm.sigma * (2 / (self.levels.n - 1))
        return straight_through(rows, norm, unit, self.levels, self.block, dtype)

    def scale(self) -> Tensor:
        """The step in units of the largest magnitude."""
        return torch.tensor(2 / (self.levels.n - 1))
