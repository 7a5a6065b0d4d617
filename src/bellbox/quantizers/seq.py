"""SEQ, stretched elastic quantization (ParetoQ, arXiv 2502.02631): levels kept off the ends, and a learned range a row.

One learned range `a` a row of a weight, one for an activation; no rotation. With m = n/2, d = 1/2 for even n, else 0:

    x_hat = a * (round(clip(x/a, -.99, .99) m - d) + d) / m      (2 bits: +-1/4 a, +-3/4 a; ternary: 0, +-2/3 a)
    start: a = max|x|;  g_x = G where |x/a| <= .99
    g_a = sum(G (x_hat/a - x/a inside, +-(m - d)/m outside)) / sqrt(numel Qp), Qp = n/2 - 1, at least 1
    one bit: x_hat = a sign(x); start: a = mean|x|; g_x = G where |x/a| <= 1; g_a = sum(G sign(x)) / sqrt(numel Qp)

A tie goes up, also at 1 bit: sign(0) = 1. max(a, 1e-5) is used for a.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.quantizers.base import Normaliser
from bellbox.quantizers.learned import LearnedQuantizer, unset
from bellbox.quantizers.moments import Moments
from bellbox.quantizers.spec import Granularity, QuantizerSpec
from bellbox.quantizers.straight_through import ClipRange, Learned, straight_through

FLOOR = 1e-5
MAX_LEVELS = 128  # with more, the clip at .99 would leave the outermost level unused


class SEQ(LearnedQuantizer):
    """SEQ of one tensor; see `Quantizer` for the arguments."""

    method = "seq"
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self.a = nn.Parameter(unset(1) if rows is None else unset(rows, 1))

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Symmetric levels, from -a to a."""
        if n > MAX_LEVELS or zero_point not in (None, -0.5):
            raise BellboxError(f"seq has 2 to {MAX_LEVELS} levels, symmetric about zero (zero_point -0.5)")
        return Levels.uniform(n, -0.5, 2 / n)

    @property
    def step(self) -> float:
        """What one level is worth, in units of a."""
        return 2.0 if self.levels.n == 2 else 2 / self.levels.n

    def set_from(self, x: Tensor) -> None:
        """See the module: of a weight, row by row."""
        if self.rows is None:
            super().set_from(x)
            return
        size = x.abs()
        start = size.mean(-1, keepdim=True) if self.levels.n == 2 else size.amax(-1, keepdim=True)
        self.a.copy_(start.clamp(min=FLOOR))

    def set_from_moments(self, moments: Moments) -> None:
        """See the module."""
        self.a.copy_((moments.mean_abs if self.levels.n == 2 else moments.absmax).clamp(min=FLOOR))

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """See `Quantizer.fake_quantize`."""
        n, a = self.levels.n, self._range()
        gain = 1 / math.sqrt(max(1, rows.numel()) * max(1.0, n / 2 - 1))
        if n == 2:
            clip_range, learned = ClipRange(-1, 1), Learned(gain, subtract=False)
        else:
            clip_range = ClipRange(-0.99, 0.99)
            learned = Learned(gain, beyond=1 / n if n % 2 else 0.0)
        unit = a * self.step
        return straight_through(rows, norm, unit, self.levels, self.block, dtype, clip_range, a, learned)

    def rstd(self) -> Tensor:
        """1/a."""
        return 1 / self._range().detach()

    def scale(self) -> Tensor:
        """The step, fp32."""
        return self._range().detach().to(torch.float32) * self.step

    def _range(self) -> Tensor:
        return self.learned("a").clamp(min=FLOOR)
