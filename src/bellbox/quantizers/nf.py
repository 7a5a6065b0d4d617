"""NF-k, NormalFloat (QLoRA, arXiv 2305.14314): levels at Gaussian quantiles, a zero among them, the largest one at 1.

delta = (1/2^(k+1) + 1/(2^(k+1) - 2)) / 2
p = 2^(k-1) points evenly from delta to 1/2, and 2^(k-1) more from there to 1 - delta
levels = Phi^-1(p) / max|Phi^-1(p)|;  x_hat = s * (nearest level to x/s), s = max|x| over the row, or over a group of it
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.errors import BellboxError
from bellbox.quantizers.codebook import Codebook, levels_between


@dataclass(frozen=True)
class NFOptions:
    """How far a scale reaches."""

    group: int = 0
    """Entries that share a scale: 0 for a whole row, as BBQ's comparison has it; 64 in QLoRA."""


@functools.cache
def normal_float(n: int) -> tuple[float, ...]:
    """The n rising levels, n a power of two; the largest magnitude is 1."""
    half, delta = n // 2, (1 / (2 * n) + 1 / (2 * n - 2)) / 2
    below = [delta + (0.5 - delta) * i / max(1, half - 1) for i in range(half)]
    above = [0.5 + (0.5 - delta) * i / half for i in range(1, half + 1)]
    quantiles = [NormalDist().inv_cdf(p) if p != 0.5 else 0.0 for p in (*below, *above)]
    largest = max(map(abs, quantiles))
    return tuple(q / largest for q in quantiles)


class NF(Codebook):
    """NormalFloat of one tensor; see `Quantizer` for the arguments. It learns nothing and stores nothing."""

    method = "nf"
    Options = NFOptions
    measured = "absmax"

    options: NFOptions

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Thresholds halfway between the levels."""
        self.group = self.options.group or self.features
        if self.group < 1 or self.features % self.group:
            raise BellboxError(f"group {self.group} of nf does not divide {self.features} features")
        if n & (n - 1) or zero_point is not None:
            raise BellboxError("nf has a power of two of levels, and no zero point to choose: bits=2, 3 or 4")
        self.values = normal_float(n)
        return levels_between(self.values)

    def table(self) -> Tensor:
        """Values of the codes, rising, `[n]`, in units of the scale."""
        return torch.tensor(self.values, dtype=torch.float64)
