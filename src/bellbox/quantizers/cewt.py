"""The quantizer of CEWT as published (the BBQ authors' follow-up, arXiv 2609.32659): BBQ whose scales keep norms.

Codes are BBQ's, with the half-integer grid at every width. Nothing is learned: a level is worth what gives the row of
an input its own L2 norm again, and the whole weight its own Frobenius norm. With u the levels q, straight-through
(n Phi(v) - n/2 - z with v = butterfly(x) r), and norms differentiated as well:

    input:   x_hat = |x| u / |u|                    v = x H / RMS of the token
    weight:  w_hat = |W| (c u) / |c u|              v = W / RMS of the whole tensor; c: RMS of each row

So the grid of a weight is the tensor's, its scale the row's. (The authors multiply by zeta = 1.694 before they divide
by the norm, which takes it out again.) They add 1e-8 to sigma and to norms; here sigma has that floor, and levels that
are all zero stay zero. Weights are meant to live in the rotated domain, on the hyperball, projected after each step:
`Recipe.cewt`, and `optimizer.cewt` of a run (`bellbox.optim.cewt`). `method: bbq` with CEWT is ours.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.core.hadamard import DEFAULT_BLOCK
from bellbox.ops.encode import compute_dtype, kept_norm, row_sigma
from bellbox.quantizers.base import Normaliser, Quantizer
from bellbox.quantizers.bbq import boxed
from bellbox.quantizers.spec import Granularity, QuantizerSpec


class CEWTQuantizer(Quantizer):
    """Norm-keeping BBQ of one tensor; see `Quantizer` for the arguments. It learns nothing and stores nothing."""

    method = "cewt"
    own_block: ClassVar[int] = DEFAULT_BLOCK
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("tensor",)
    rescale = True

    def __init__(self, features: int, spec: QuantizerSpec, rows: int | None = None) -> None:
        super().__init__(features, spec, rows)
        if rows is None:
            self.normalise = "norm"

    def make_levels(self, n: int, zero_point: float | None) -> Levels:
        """Gaussian quantiles between any number of levels, symmetric about zero unless a zero point is asked for."""
        return Levels.gaussian(n, -0.5 if zero_point is None else zero_point)

    def fake_quantize(self, rows: Tensor, norm: Normaliser, dtype: torch.dtype) -> Tensor:
        """`x_hat` of `[rows, features]` in `dtype`, with CEWT's gradient."""
        work = compute_dtype(rows)
        wide = rows.to(work)
        levels = boxed(rows, norm, self.levels, self.block, self.rows is not None, work)
        if self.rows is not None:
            each = torch.linalg.vector_norm(wide, dim=-1, keepdim=True, dtype=torch.float64)
            levels = levels * (each / math.sqrt(self.features)).to(work)
        given, coded = self._norm(wide), self._norm(levels)
        factor = given / torch.where(coded == 0, 1.0, coded)  # of NaN stays NaN
        return (levels * factor.to(work)).to(dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and row scales that give each row, or the weight, the norm that it had."""
        rows = self.rows_of(x)
        norm = self.normaliser(rows, training=False)
        codes = self.codes_of(rows, norm.r)
        levels = self.levels.decode(codes, torch.float64)
        if self.rows is None:
            scales = kept_norm(rows, levels, norm.r)
        else:
            own = row_sigma(rows)
            whole = kept_norm(rows.reshape(1, -1), (levels * own).reshape(1, -1), norm.r)
            scales = own.to(torch.float32) * whole
        return codes.reshape(x.shape), scales.reshape(self._shape_of_marks(x))

    def scale(self) -> Tensor:
        """One: rows have scales of their own."""
        return torch.ones(())

    def _norm(self, rows: Tensor) -> Tensor:
        """fp64, `[rows, 1]` of an input, `[]` of a weight."""
        if self.rows is not None:
            return torch.linalg.vector_norm(rows, dtype=torch.float64)
        return torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
