"""Rounding whose gradient passes straight through inside a clip_range, as most methods but BBQ have it.

With v = butterfly(x) * r, the level q of its code and G = dL/dx_hat, where `x_hat = unit * q`:

    g_x = H^T [ G inside the clip_range, 0 outside ]
    g_a = g * sum( G * (q - v inside, q outside) )        (LSQ: a is a learned unit and r = 1/a)

The forward is the fused kernel of BBQ, which serves any thresholds; the way back is the rotation kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bellbox.core.grid import Levels
from bellbox.ops.clip_backward import clip_backward
from bellbox.ops.fake_quantize import bbq_forward
from bellbox.ops.rotate import rotation
from bellbox.ops.transforms import TransformableFunction, apply, differentiated_again
from bellbox.quantizers.base import Normaliser


@dataclass(frozen=True)
class ClipRange:
    """Where the gradient passes, on the normalised value v; both ends belong to it.

    Examples:
        >>> from bellbox.quantizers.straight_through import ClipRange
        >>> ClipRange(-2.0, 2.0)
        ClipRange(low=-2.0, high=2.0)
    """

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


class _StraightThrough(TransformableFunction):
    """`x_hat`, and the normalised value v, whose gradient serves second derivatives."""

    @staticmethod
    def forward(
        x: Tensor,  # [rows, features]
        a: Tensor | None,  # [rows, 1] or []  # noqa: ARG004
        r: Tensor,  # [rows, 1] or [1, 1]; where `a` is given, 1 / (a sqrt(block))
        unit: Tensor,  # [rows, 1] or [1, 1], compute dtype: what a level is worth
        levels: Levels,
        block: int,
        clip_range: ClipRange | None,  # noqa: ARG004
        learned: Learned | None,  # noqa: ARG004
        gain: Tensor | None,  # [rows, 1]: what the gradient to x is multiplied with  # noqa: ARG004
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        return bbq_forward(x, r, unit, levels.thresholds, levels.offset, block, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        (x, a, r, _, _, ctx.block, ctx.clip_range, ctx.learned, gain, _), (x_hat, v) = inputs, output
        # x_hat is kept by the matrix product anyway; v only decides who is inside.
        clipped = ctx.clip_range is not None
        ctx.save_for_backward(
            v if clipped else None, None if a is None else x_hat, a, r if clipped else None, gain
        )
        ctx.input_dtype = x.dtype
        ctx.set_materialize_grads(False)
        if not clipped:
            ctx.mark_non_differentiable(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        v, x_hat, a, r, gain = ctx.saved_tensors
        (grad, grad_v), clip_range = grads, ctx.clip_range
        g_x = g_a = None
        if grad is not None:
            inside = grad
            if clip_range is not None:
                clip = partial(apply, _Clipped) if differentiated_again() else _Clipped.forward
                inside, g_a = clip(grad.contiguous(), v, x_hat, a, clip_range, ctx.learned)
                g_a = g_a if a is not None else None
            if gain is not None:
                inside = inside * gain
            if ctx.block > 1:
                g_x = rotation(inside.contiguous(), ctx.block**-0.5, ctx.block, ctx.input_dtype)
            else:
                g_x = inside.to(ctx.input_dtype)
        # Where nothing is clipped v has no gradient; a compiler gives zeros for it all the same.
        if grad_v is not None and clip_range is not None:  # of v = butterfly(x) r
            wide = grad_v.to(r.dtype)
            through = rotation((wide * r).contiguous(), 1.0, ctx.block, ctx.input_dtype)
            g_x = through if g_x is None else g_x + through
            if a is not None:
                more = (-(wide * v).sum(-1, keepdim=True) / a.reshape(-1, 1)).sum_to_size(
                    a.reshape(-1, 1).shape
                )
                more = more.reshape(a.shape).to(a.dtype)
                g_a = more if g_a is None else g_a + more
        return g_x, g_a, *[None] * 8


class _Clipped(TransformableFunction):
    """The gradient inside the clip range, and that of the learned scale (empty without one)."""

    @staticmethod
    def forward(
        grad: Tensor,
        v: Tensor,
        x_hat: Tensor | None,
        a: Tensor | None,
        clip_range: ClipRange,
        learned: Learned | None,
    ) -> tuple[Tensor, Tensor]:
        inside, sums = clip_backward(grad, v, x_hat, clip_range.low, clip_range.high)
        if a is None or learned is None:
            return inside, sums
        return inside, _gradient_of_scale(sums, a, learned)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        grad, v, x_hat, a, ctx.clip_range, ctx.learned = inputs
        ctx.save_for_backward(grad, v, x_hat, a)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, v, x_hat, a = ctx.saved_tensors
        (g_inside, g_scale), clip_range, learned = grads, ctx.clip_range, ctx.learned
        within = (v >= clip_range.low) & (v <= clip_range.high)
        g_grad = None if g_inside is None else torch.where(within, g_inside, 0)
        g_v = None
        if a is not None and learned is not None and g_scale is not None:
            share = (g_scale * learned.gain).reshape(-1, 1)
            code = (x_hat / a.reshape(-1, 1)).detach()  # a constant
            factor = torch.where(within, -v if learned.subtract else 0.0, learned.beyond * v.sign())
            factor = factor + code if learned.valued else factor
            further = share * factor
            g_grad = further if g_grad is None else g_grad + further
            if learned.subtract:
                g_v = torch.where(within, -share * grad, 0).to(v.dtype)
        return None if g_grad is None else g_grad.to(grad.dtype), g_v, None, None, None, None


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
    return apply(_StraightThrough, rows, a, norm.r, unit, *rest)[0]
