"""Learned thresholds, as N2UQ has them: a staircase forward, the piecewise linear function that it follows backward.

With v = s1 x and intervals of widths a_1..a_N from beta on, step i of the staircase lies in the middle of interval i.
The gradient is that of the line through the interval, from one level to the next, and zero outside all of them; so
beta, the widths, and the factors s1 and s2 of input and output have one too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bellbox.ops.learned_thresholds import learned_backward, learned_forward


class _LearnedThresholds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        beta: Tensor,
        a: Tensor,
        s1: Tensor,
        s2: Tensor,
        thresholds: Tensor,
        r: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        scale = (s2 * (2 / len(a))).to(r.dtype).reshape(1, 1)
        x_hat, v = learned_forward(x, r, scale, thresholds, dtype)
        ctx.save_for_backward(v, x_hat, beta, a, s1, s2)
        ctx.input_dtype = x.dtype
        return x_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v, x_hat, beta, a, s1, s2 = ctx.saved_tensors
        grad = grads[0].contiguous()
        edges = torch.cat((beta.reshape(1), beta + a.cumsum(0)))
        g_v, (sums, into) = learned_backward(grad, v, edges, s2 * (2 / len(a)) / a)
        g_a = sums.cumsum(0) - sums.sum() - into / a  # wider a_j: later intervals begin later
        # A factor of exactly zero gets no gradient: what it multiplies is gone.
        g_s1 = (into + edges[:-1] * sums).sum() / torch.where(s1 == 0, math.inf, s1)
        g_s2 = (grad * x_hat).sum(dtype=a.dtype) / torch.where(s2 == 0, math.inf, s2)
        g_x = (g_v * s1).to(ctx.input_dtype)
        return g_x, -sums.sum().to(a.dtype), g_a.to(a.dtype), g_s1.to(a.dtype), g_s2, None, None, None


def learned_thresholds(
    x: Tensor,
    beta: Tensor,
    a: Tensor,
    s1: Tensor,
    s2: Tensor,
    thresholds: Tensor,
    r: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`s2 (2/N) (#{thresholds <= v} - N/2)`, differentiable.

    Args:
        x: `[rows, features]`.
        beta: `[]`, where the first interval begins.
        a: `[N]`, widths above zero.
        s1: `[]`, factor of the input.
        s2: `[]`, factor of the output.
        thresholds: `[N]`, the middles of the intervals; no gradient.
        r: `[rows, 1]`, s1 in the compute dtype, NaN for rows that are not finite; no gradient.
        dtype: of the result.

    Returns:
        `[rows, features]` in `dtype`.
    """
    return _LearnedThresholds.apply(x, beta, a, s1, s2, thresholds, r, dtype)  # type: ignore[return-value]
