"""SEQ, stretched elastic quantization (ParetoQ, arXiv 2502.02631): levels kept off the ends, and a learned range a row.

One learned number `a` a row of a weight, one for an activation; no rotation. The rule `stretched`, at all widths as in
BBQ's comparison, has with m = n/2, and d = 1/2 for even n, else 0:

    x_hat = a * (round(clip(x/a, -.99, .99) m - d) + d) / m      (2 bits: +-1/4 a, +-3/4 a; ternary: 0, +-2/3 a)
    start: a = max|x|;  g_x = G where |x/a| <= .99
    g_a = sum(G (x_hat/a - x/a inside, +-(m - d)/m outside)) / sqrt(numel Qp), Qp = n/2 - 1, at least 1
    one bit: x_hat = a sign(x); start: a = mean|x|; g_x = G where |x/a| <= 1; g_a = sum(G sign(x)) / sqrt(numel Qp)

The rule `paretoq` is that of ParetoQ's own code: the same up to 2 bits, but from 3 bits on whole levels and the
gradient of LSQ, where `a` is a step:

    x_hat = a * clip(round(x/a), -m, m - 1);  start: a = max|x| / Qp;  g_x = G where -m <= x/a <= m - 1
    g_a = sum(G (x_hat/a - x/a inside, -m or m - 1 outside)) / sqrt(numel Qp)

A tie goes up, also at 1 bit: sign(0) = 1. max(a, 1e-5) is used for a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

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


@dataclass(frozen=True)
class SEQOptions:
    """Whose rule above 2 bits."""

    rule: Literal["stretched", "paretoq"] = "stretched"
    """`stretched` levels at all widths (BBQ's comparison), or `paretoq`: above 2 bits whole levels, LSQ's gradient."""


class SEQ(LearnedQuantizer):
    """SEQ of one tensor; see `Quantizer` for the arguments."""

    method = "seq"
    Options = SEQOptions
    # Where the rules are different functions, their zero points tell states apart; elsewhere they are one.
    training_options = frozenset({"rule"})
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)

    options: SEQOptions

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self.a = nn.Parameter(unset(1) if rows is None else unset(rows, 1))

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Symmetric levels, from -a to a; or whole ones, -n/2 to n/2 - 1."""
        self.whole = self.options.rule == "paretoq" and n > 4
        if self.whole:
            if n % 2 or zero_point not in (None, 0.0):
                raise BellboxError(
                    "seq with rule=paretoq has 2, 3, 4 or an even number of levels, whole ones above 4 (zero_point 0)"
                )
            return Levels.uniform(n, 0.0)
        if n > MAX_LEVELS or zero_point not in (None, -0.5):
            raise BellboxError(f"seq has 2 to {MAX_LEVELS} levels, symmetric about zero (zero_point -0.5)")
        return Levels.uniform(n, -0.5, 2 / n)

    @property
    def step(self) -> float:
        """What one level is worth, in units of a."""
        if self.whole:
            return 1.0
        return 2.0 if self.levels.n == 2 else 2 / self.levels.n

    @property
    def largest(self) -> float:
        """Qp, at least 1."""
        return max(1.0, self.levels.n / 2 - 1)

    def _start(self, mean: Tensor, largest: Tensor) -> Tensor:
        """What a starts with, from the mean and the largest magnitude."""
        if self.whole:
            largest = largest / self.largest
        return (mean if self.levels.n == 2 else largest).clamp(min=FLOOR)

    def set_from(self, x: Tensor) -> None:
        """The first step: of an input from all of its values, of a weight row by row."""
        if self.rows is None:
            super().set_from(x)
            return
        size = x.abs()
        self.a.copy_(self._start(size.mean(-1, keepdim=True), size.amax(-1, keepdim=True)))

    def set_from_moments(self, moments: Moments) -> None:
        """The first step, from magnitudes that may be sums over several processes."""
        self.a.copy_(self._start(moments.mean_abs, moments.absmax))

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with SEQ's gradient."""
        n, a = self.levels.n, self.divided_by_row(self._range(), rows)
        gain = 1 / math.sqrt(max(1, rows.numel()) * self.largest)
        if self.whole:
            clip_range, learned = ClipRange(-n / 2, n / 2 - 1), Learned(gain)
        elif n == 2:
            clip_range, learned = ClipRange(-1, 1), Learned(gain, subtract=False)
        else:
            clip_range = ClipRange(-0.99, 0.99)
            learned = Learned(gain, beyond=1 / n if n % 2 else 0.0)
        unit = a * self.step
        return straight_through(rows, norm, unit, self.levels, self.block, dtype, clip_range, a, learned)

    def rstd(self) -> Tensor:
        """Reciprocal of the learned range: what rows are multiplied with before they are coded."""
        return 1 / self._range().detach()

    def scale(self) -> Tensor:
        """The step, fp32."""
        return self._range().detach().to(torch.float32) * self.step

    def _range(self) -> Tensor:
        return self.learned("a").clamp(min=FLOOR)
