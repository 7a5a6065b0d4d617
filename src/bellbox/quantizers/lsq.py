"""LSQ, learned step size (arXiv 1902.08153), in the form that BBQ and QuEST compare with, and in the classic one.

One learned step a per tensor, no rotation:

    mid-rise: q = round(clip(x/a - 1/2, -n/2, n/2 - 1)) + 1/2      (levels +-1/2, +-3/2, ...)
    classic:  q = round(clip(x/a, -n/2, n/2 - 1))              (whole levels, as in the LSQ paper)
    unsigned: q = round(clip(x/a, 0, n - 1)) of activations, weights as above: for inputs that are never negative, such
              as a ReLU's, of which both other forms would leave half of the levels unused
    x_hat = a q;  start: a = 2 mean|x| / sqrt(Qp), Qp = n/2 - 1, unsigned n - 1, at least 1
    g_x = G inside the clip;  g_a = sum(G (q - x/a inside, q outside)) / sqrt(numel Qp)

A tie goes up. |a| + 1e-8 is used for a. Weight decay of `a` shrinks the grid of the whole tensor: the released baseline
of BBQ has it, one cause of its divergence; here it is the option `decay_scale`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels
from bellbox.quantizers.base import Normaliser
from bellbox.quantizers.learned import LearnedQuantizer, unset
from bellbox.quantizers.moments import Moments
from bellbox.quantizers.spec import Granularity, QuantizerSpec
from bellbox.quantizers.straight_through import ClipRange, Learned, straight_through

FLOOR = 1e-8


@dataclass(frozen=True)
class LSQOptions:
    """Which of LSQ's forms."""

    classic: bool = False
    """Whole levels, zero among them, as in the LSQ paper; else mid-rise."""
    unsigned: bool = False
    """Levels 0..n-1 for activations, which are then never negative."""
    decay_scale: bool = False
    """Let weight decay pull on `a`."""


class LSQ(LearnedQuantizer):
    """LSQ of one tensor; see `Quantizer` for the arguments."""

    method = "lsq"
    training_options = frozenset({"decay_scale"})
    Options = LSQOptions
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)

    options: LSQOptions

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self.a = nn.Parameter(unset(1))
        self.decayed = ("a",) if self.options.decay_scale else ()

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Levels +-1/2, +-3/2, ...; classic -n/2..n/2-1; or 0..n-1."""
        if zero_point is None:
            zero_point = 0.0 if self.options.classic and n % 2 == 0 else -0.5
            if self.unsigned:
                zero_point = -n / 2
        return Levels.uniform(n, zero_point)

    @property
    def unsigned(self) -> bool:
        """Whether its input is never negative."""
        return self.options.unsigned and self.rows is None

    @property
    def largest(self) -> float:
        """Qp, at least 1: the largest level of the classic form."""
        return max(1.0, self.levels.n - 1 if self.unsigned else self.levels.n / 2 - 1)

    def set_from_moments(self, moments: Moments) -> None:
        """The first step, 2 E|x| / sqrt(largest level), from sums over several processes perhaps."""
        self.a.copy_((2 * moments.mean_abs / math.sqrt(self.largest)).clamp(min=FLOOR))

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with LSQ's gradient."""
        low, high = -self.levels.offset, self.levels.n - 1 - self.levels.offset
        learned = Learned(1 / math.sqrt(max(1, rows.numel()) * self.largest))
        a = self.divided_by_row(self._step(), rows)
        return straight_through(
            rows, norm, a, self.levels, self.block, dtype, ClipRange(low, high), a, learned
        )

    def rstd(self) -> Tensor:
        """Reciprocal of the learned step: what rows are multiplied with before they are coded."""
        return 1 / self._step().detach()

    def scale(self) -> Tensor:
        """The learned step, fp32: what one level is worth."""
        return self._step().detach().to(torch.float32)

    def _step(self) -> Tensor:
        return self.learned("a").abs() + FLOOR
