"""N2UQ, nonuniform-to-uniform (arXiv 2111.14826): learned thresholds, evenly spaced levels.

Activations, with N = n - 1, D = 2/N and v = s1 x: interval widths a_1..a_N (at least 1e-3) from beta on,

    T_1 = beta + a_1/2, T_i = T_(i-1) + (a_(i-1) + a_i)/2;  x_hat = s2 D (#{i: v >= T_i} - N/2)
    g_v = G s2 D/a_i inside the i-th interval (beta + a_1 + .. + a_(i-1), + a_i], 0 outside

and beta, a, s1, s2 get the gradient of that piecewise linear function too. Start: a_i = 4 RMS/N, beta = -2 RMS, s1 = 1,
s2 = 2 RMS: the grid is shifted and scaled for inputs of zero mean; the paper's inputs are never negative.

Weights, with m = N/2: s = (N/2^(b-1)) mean|w| of each row, detached; x_hat = s (round((clip(w/s, -1, 1) + 1) m)/m - 1).
The gradient is G/s for every weight, beyond the clip too, as in the released code, which passes it through w/s.
`released_gradient=false` leaves the factor 1/s out, `masked=true` keeps it from weights beyond the clip: both are ours.

A tie goes up, where the paper has a plain ">" for activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels, strictly_rising
from bellbox.errors import BellboxError
from bellbox.ops.learned_thresholds import learned_encode
from bellbox.quantizers.base import Normaliser
from bellbox.quantizers.learned import LearnedQuantizer, unset
from bellbox.quantizers.learned_thresholds import learned_thresholds
from bellbox.quantizers.moments import Moments
from bellbox.quantizers.spec import Granularity, QuantizerSpec
from bellbox.quantizers.straight_through import ClipRange, straight_through

NARROWEST = 1e-3


@dataclass(frozen=True)
class N2UQOptions:
    """The gradient of weights: the released code's, or plainer ones."""

    released_gradient: bool = True
    """Divide the gradient of a weight by its scale, as the released code does."""
    masked: bool = False
    """No gradient to weights beyond the clip, |w| > s: 42 % of a Gaussian's at 1 bit."""


class N2UQ(LearnedQuantizer):
    """N2UQ of one tensor; see `Quantizer` for the arguments."""

    method = "n2uq"
    training_options = frozenset({"released_gradient", "masked"})
    Options = N2UQOptions
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row",)
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)

    options: N2UQOptions

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self.rescale = rows is not None
        if rows is None:
            if self.block != 1:
                raise BellboxError("n2uq learns thresholds for its input as it is: block=1")
            self.beta, self.s1, self.s2 = (nn.Parameter(unset(1)) for _ in range(3))
            self.a = nn.Parameter(unset(spec.levels - 1))
        self._known_thresholds: list[float] = []

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Symmetric levels; of activations the thresholds are replaced by the learned ones."""
        if zero_point not in (None, -0.5):
            raise BellboxError("n2uq has levels that are symmetric about zero: zero_point -0.5")
        return Levels.uniform(n, -0.5, 2 / (n - 1))

    def set_from_moments(self, moments: Moments) -> None:
        """See the module."""
        if self.rows is None:
            rms = moments.rms
            self.beta.copy_(-2 * rms)
            self.a.copy_(4 * rms / len(self.a))
            self.s1.fill_(1.0)
            self.s2.copy_(2 * rms)

    def measure(self, rows: Tensor) -> Tensor:
        """s of a weight, fp64."""
        n = self.levels.n
        return rows.abs().to(torch.float64).mean(-1, keepdim=True) * ((n - 1) / (n / 2))

    @property
    def levels(self) -> Levels:
        """With the thresholds as they are learned by now. (A compiled graph cannot know them: see `codes_of`.)"""
        if self.rows is None and not torch.compiler.is_compiling() and self.is_set:
            # By value: a parameter may be changed past its version counter, as through `.data`.
            known = self._thresholds().tolist()
            if known != self._known_thresholds:
                self._levels = Levels(self._levels.n, -0.5, strictly_rising(known))
                self._known_thresholds = known
        return self._levels

    def codes_of(self, rows: Tensor, r: Tensor) -> Tensor:
        """uint8 codes of `[rows, features]`; of activations by a tensor of thresholds, which compiled graphs follow."""
        if self.rows is not None:
            return super().codes_of(rows, r)
        return learned_encode(rows, r, self._thresholds())

    def thresholds(self, device: torch.device) -> Tensor:
        """Thresholds between codes, fp32 `[n - 1]`; in a compiled graph those that are learned by the time it runs."""
        if self.rows is not None or not torch.compiler.is_compiling():
            return super().thresholds(device)
        return self._thresholds().to(device, torch.float32)

    @torch.no_grad()
    def _thresholds(self) -> Tensor:
        a = self._widths()
        return self.learned("beta") + a.cumsum(0) - a / 2

    def _widths(self) -> Tensor:
        return self.learned("a").reshape(-1).clamp(min=NARROWEST)

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with N2UQ's gradient."""
        if self.rows is None:
            beta, s1, s2 = (self.learned(name) for name in ("beta", "s1", "s2"))
            numbers = beta, self._widths(), s1, s2, self._thresholds()
            return learned_thresholds(rows, *numbers, norm.r, dtype)
        assert norm.sigma is not None
        unit = norm.sigma * (2 / (self._levels.n - 1))
        gain = 1 / norm.sigma if self.options.released_gradient else None
        clip_range = ClipRange(-1, 1) if self.options.masked else None
        return straight_through(rows, norm, unit, self._levels, self.block, dtype, clip_range, gain=gain)

    def rstd(self) -> Tensor:
        """s1."""
        return self.learned("s1").detach()

    def scale(self) -> Tensor:
        """s2 D of activations; the step of weights in units of s."""
        step = 2 / (self._levels.n - 1)
        if self.rows is not None:
            return torch.tensor(step)
        return self.learned("s2").detach().to(torch.float32) * step
