"""Rounding whose gradient passes straight through inside a clip_range, as most methods but BBQ have it.

With v = butterfly(x) * r, the level q of its code and G = dL/dx_hat, where `x_hat = unit * q`:

    g_x = H^T [ G inside the clip_range, 0 outside ]
    g_a = g * sum( G * (q - v inside, q outside) )        (LSQ: a is a learned unit and r = 1/a)

The forward is the fused kernel of BBQ, which serves any thresholds; the way back is the rotation kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bellbox.core.grid import Levels
from bellbox.ops.clip_backward import clip_backward
from bellbox.ops.fake_quantize import bbq_forward
from bellbox.ops.rotate import rotate
from bellbox.quantizers.base import Normaliser


@dataclass(frozen=True)
class ClipRange:
    """Where the gradient passes, on the normalised value v; both ends belong to it."""

    low: float
    high: float


@dataclass(frozen=True)
class Learned:
    """How a learned scale `a` gets its gradient; `x_hat = a * (value of the code)`."""

    gain: float
    """What the sum is multiplied with."""
    subtract: bool = True
    """Whether v is subtracted inside the clip_range."""
    valued: bool = True
    """Whether the value of the code counts, inside and outside."""
    beyond: float = 0.0
    """What G is multiplied with outside the clip_range, above the magnitude of the outermost code's value."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [rows, features]
        a: Tensor | None,  # [rows, 1] or []
        r: Tensor,  # [rows, 1] or [1, 1]
        unit: Tensor,  # [rows, 1] or [1, 1], compute dtype: what a level is worth
        levels: Levels,
        block: int,
        clip_range: ClipRange | None,
        learned: Learned | None,
        gain: Tensor | None,  # [rows, 1]: what the gradient to x is multiplied with
        dtype: torch.dtype,
    ) -> Tensor:
        x_hat, v = bbq_forward(x, r, unit, levels.thresholds, levels.offset, block, dtype)
        # x_hat is kept by the matrix product anyway; v only decides who is inside.
        ctx.save_for_backward(None if clip_range is None else v, None if a is None else x_hat, a, gain)
        ctx.block, ctx.clip_range, ctx.learned, ctx.input_dtype = block, clip_range, learned, x.dtype
        return x_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v, x_hat, a, gain = ctx.saved_tensors
        (grad,) = grads
        inside, g_a, clip_range = grad, None, ctx.clip_range
        if clip_range is not None:
            inside, sums = clip_backward(grad.contiguous(), v, x_hat, clip_range.low, clip_range.high)
            g_a = None if a is None else _gradient_of_scale(sums, a, ctx.learned)
        if gain is not None:
            inside = inside * gain
        if ctx.block > 1:
            g_x = rotate(inside.contiguous(), ctx.block**-0.5, ctx.block, ctx.input_dtype)
        else:
            g_x = inside.to(ctx.input_dtype)
        return g_x, g_a, *[None] * 8


def _gradient_of_scale(sums: Tensor, a: Tensor, learned: Learned) -> Tensor:
    valued, inside, outside = sums.unbind(-1)
    total = learned.beyond * outside
    if learned.valued:
        total = total + valued / a.reshape(-1)
    if learned.subtract:
        total = total - inside
    return ((total.reshape(a.shape) if a.dim() else total.sum()) * learned.gain).to(a.dtype)


def straight_through(
    rows: Tensor,
    norm: Normaliser,
    unit: Tensor,
    levels: Levels,
    block: int,
    dtype: torch.dtype,
    clip_range: ClipRange | None = None,
    a: Tensor | None = None,
    learned: Learned | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """`unit * level`, differentiable as the module says.

    Args:
        rows: `[rows, features]`.
        norm: gives r.
        unit: what a level is worth, `[rows, 1]`, `[1, 1]` or `[]`; no gradient.
        levels: grid and thresholds.
        block: rotation block.
        dtype: of the result.
        clip_range: where the gradient passes; everywhere where None.
        a: a learned scale that `unit` is a multiple of, above zero, `[rows, 1]` or `[]`; `clip_range` is then needed.
        learned: how `a` gets its gradient.
        gain: `[rows, 1]`, what the gradient to the rows is multiplied with.

    Returns:
        `[rows, features]` in `dtype`, rotated.
    """
    unit = unit.detach().to(norm.r.dtype).reshape(-1, 1)
    gain = None if gain is None else gain.to(norm.r.dtype)
    rest = levels, block, clip_range, learned, gain, dtype
    return _StraightThrough.apply(rows, a, norm.r, unit, *rest)  # type: ignore[return-value]
