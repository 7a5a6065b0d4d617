"""Learned thresholds, as N2UQ has them: a staircase forward, the piecewise linear function that it follows backward.

With v = s1 x and intervals of widths a_1..a_N from beta on, step i of the staircase lies in the middle of interval i.
The gradient is that of the line through the interval, from one level to the next, and zero outside all of them; so
beta, the widths, and the factors s1 and s2 of input and output have one too.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bellbox.ops.learned_thresholds import learned_backward, learned_forward
from bellbox.ops.transforms import TransformableFunction, apply, differentiated_again, transposed


class _LearnedThresholds(TransformableFunction):
    """`x_hat`, and v = s1 x, whose gradient serves second derivatives."""

    @staticmethod
    def forward(
        x: Tensor,
        beta: Tensor,  # noqa: ARG004
        a: Tensor,
        s1: Tensor,  # noqa: ARG004
        s2: Tensor,
        thresholds: Tensor,
        r: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        scale = (s2 * (2 / len(a))).to(r.dtype).reshape(1, 1)
        return learned_forward(x, r, scale, thresholds, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (x, beta, a, s1, s2, *_), (x_hat, v) = inputs, output
        ctx.save_for_backward(v, x_hat, beta, a, s1, s2)
        ctx.input_dtype = x.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v, x_hat, beta, a, s1, s2 = ctx.saved_tensors
        grad, grad_v = grads
        found: tuple[Tensor | None, ...] = (None,) * 5
        if grad is not None:
            gradient = partial(apply, _Gradient) if differentiated_again() else _Gradient.forward
            found = cast(
                "tuple[Tensor, ...]", gradient(grad.contiguous(), v, x_hat, beta, a, s1, s2, ctx.input_dtype)
            )
        if grad_v is not None:  # of v = s1 x
            g_x, g_beta, g_a, g_s1, g_s2 = found
            through = (grad_v * s1).to(ctx.input_dtype)
            factor = (grad_v * v).sum(dtype=s1.dtype) / torch.where(s1 == 0, math.inf, s1)
            g_x = through if g_x is None else g_x + through
            g_s1 = factor if g_s1 is None else g_s1 + factor
            found = g_x, g_beta, g_a, g_s1, g_s2
        return *found, None, None, None


class _Gradient(TransformableFunction):
    """The gradients to x, beta, a, s1 and s2."""

    @staticmethod
    def forward(
        grad: Tensor,
        v: Tensor,
        x_hat: Tensor,
        beta: Tensor,
        a: Tensor,
        s1: Tensor,
        s2: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        edges = torch.cat((beta.reshape(1), beta + a.cumsum(0)))
        g_v, (sums, into) = learned_backward(grad, v, edges, s2 * (2 / len(a)) / a)
        g_a = sums.cumsum(0) - sums.sum() - into / a  # wider a_j: later intervals begin later
        # A factor of exactly zero gets no gradient: what it multiplies is gone.
        g_s1 = (into + edges[:-1] * sums).sum() / torch.where(s1 == 0, math.inf, s1)
        g_s2 = (grad * x_hat).sum(dtype=a.dtype) / torch.where(s2 == 0, math.inf, s2)
        g_x = (g_v * s1).to(dtype)
        return g_x, -sums.sum().to(a.dtype), g_a.to(a.dtype), g_s1.to(a.dtype), g_s2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:-1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, v, x_hat, beta, a, s1, s2 = ctx.saved_tensors
        steps = len(a)
        codes = (x_hat / torch.where(s2 == 0, math.inf, s2)).detach()  # constants
        edges = torch.cat((beta.reshape(1), beta + a.cumsum(0))).detach()
        within = (v > edges[:-1].reshape(-1, 1, 1)) & (v <= edges[1:].reshape(-1, 1, 1))

        def formula(
            grad: Tensor, v: Tensor, beta: Tensor, a: Tensor, s1: Tensor, s2: Tensor
        ) -> tuple[Tensor, ...]:
            begin = torch.cat((beta.reshape(1), beta + a.cumsum(0)[:-1]))
            slopes = s2 * (2 / steps) / a
            each = torch.where(within, grad * slopes.reshape(-1, 1, 1), 0)
            sums, total = each.sum((1, 2)), (each * v).sum((1, 2))
            into = total - begin * sums
            g_a = sums.cumsum(0) - sums.sum() - into / a
            return each.sum(0) * s1, -sums.sum(), g_a, total.sum() / s1, (grad * codes).sum()

        inputs = grad.to(a.dtype), v.to(a.dtype), beta, a, s1, s2
        g_grad, g_v, g_beta, g_a, g_s1, g_s2 = transposed(formula, inputs, grads)
        return g_grad.to(grad.dtype), g_v.to(v.dtype), None, g_beta, g_a, g_s1, g_s2, None


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
    return apply(_LearnedThresholds, x, beta, a, s1, s2, thresholds, r, dtype)[0]
