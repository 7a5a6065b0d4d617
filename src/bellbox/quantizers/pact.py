"""PACT, parameterized clipping activation (arXiv 1805.06085): a ReLU whose upper end is learned; weights by a rule.

Activations, with one learned alpha a tensor and N = n - 1:

    x_hat = round(clip(x, 0, alpha) N/alpha) alpha/N;  g_x = G where 0 < x <= alpha;  g_alpha = sum(G where x > alpha)

`signed` clips at -alpha and alpha, for inputs that are not a ReLU's: levels +-alpha/N, +-3 alpha/N, ...;
g_alpha = sum(G sign(x) where |x| > alpha). Weight decay pulls alpha down, as in the paper. A tie goes up.

Two things differ. The paper starts alpha far too large, and weight decay shrinks it over many epochs; here it starts
where a Gaussian behind a ReLU has the least squared error: alpha = sqrt(2) c RMS with the c of 2n - 1 symmetric
levels (`signed`: c RMS, of n levels). And the paper's weights follow DoReFa, by the largest magnitude of the tensor,
which leaves most of them two codes at 2 bits; here n levels go evenly from -c RMS to c RMS of the row, c being that
of least squared error. The gradient passes everywhere, as with DoReFa.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.quantizers.base import Normaliser
from bellbox.quantizers.learned import LearnedQuantizer, unset
from bellbox.quantizers.moments import Moments
from bellbox.quantizers.quest import gaussian_clip
from bellbox.quantizers.spec import Granularity, QuantizerSpec
from bellbox.quantizers.straight_through import ClipRange, Learned, straight_through

FLOOR = 1e-5


@dataclass(frozen=True)
class PACTOptions:
    """For which inputs, and whether alpha shrinks."""

    signed: bool = False
    """Clip activations at -alpha and alpha, in place of 0 and alpha."""
    decay_alpha: bool = True
    """Let weight decay pull on alpha, as the paper does."""


class PACT(LearnedQuantizer):
    """PACT of one tensor; see `Quantizer` for the arguments."""

    method = "pact"
    training_options = frozenset({"decay_alpha"})
    Options = PACTOptions
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row", "tensor")
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("learned",)

    options: PACTOptions

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        self.rescale = rows is not None
        if rows is None:
            self.alpha = nn.Parameter(unset(1))
            self.decayed = ("alpha",) if self.options.decay_alpha else ()

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Symmetric levels; 0..n-1 for activations unless `signed`."""
        symmetric = self.rows is not None or self.options.signed
        if zero_point is not None:
            raise BellboxError(
                "pact has a zero point of its own for weights and for activations; leave it out"
            )
        self.top = (n - 1) / 2 if symmetric else n - 1.0
        self.clip = gaussian_clip(n) if symmetric else math.sqrt(2) * gaussian_clip(2 * n - 1)
        self.step = 1.0 if self.rows is None else self.clip / self.top
        return Levels.uniform(n, -0.5 if symmetric else -n / 2, self.step)

    def set_from_moments(self, moments: Moments) -> None:
        """See the module."""
        if self.rows is None:
            rms = moments.rms if self.options.signed else moments.positive_rms
            self.alpha.copy_((self.clip * rms).clamp(min=FLOOR))

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with PACT's gradient."""
        if self.rows is not None:
            assert norm.sigma is not None
            return straight_through(rows, norm, norm.sigma * self.step, self.levels, self.block, dtype)
        alpha = self._end()
        low = -self.top if self.options.signed else 0.0
        clipped = rows if self.options.signed else rows.relu()  # below zero nothing passes, to alpha neither
        learned = Learned(1.0, subtract=False, valued=False, beyond=1.0)
        unit = alpha / self.top
        return straight_through(
            clipped, norm, unit, self.levels, self.block, dtype, ClipRange(low, self.top), alpha, learned
        )

    def rstd(self) -> Tensor:
        """One over the step of activations."""
        return self.top / self._end().detach()

    def scale(self) -> Tensor:
        """The step, fp32; of weights in units of the RMS."""
        if self.rows is not None:
            return torch.tensor(self.step)
        return self._end().detach().to(torch.float32) / self.top

    def _end(self) -> Tensor:
        return self.learned("alpha").clamp(min=FLOOR)
