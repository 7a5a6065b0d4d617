"""RMSNorm and SwiGLU whose backward keeps their inputs only, and computes what else it needs again.

Written as a chain of operations, autograd keeps one more tensor of the size of the input for each. The backward is
made of torch operations, so it can be differentiated again. A compiler chooses by itself what is kept, and a transform
(`torch.func`) has rules for the chain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from bellbox.ops.dispatch import is_unwatched


def pays(*tensors: Tensor) -> bool:
    """Whether something is kept for a backward now, eagerly. Forward-mode derivatives go through the chain."""
    forward_mode = forward_ad._current_level >= 0
    return torch.is_grad_enabled() and not forward_mode and all(map(is_unwatched, tensors))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gate, up), grad = ctx.saved_tensors, grads[0]
        return _silu_backward(grad * up, gate), grad * F.silu(gate)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)
    gate = torch.sigmoid(x)  # torch's own has no derivative
    return grad * (gate * (1 + x * (1 - gate)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of one shape and dtype."""
    return _SwiGLU.apply(gate, up)  # type: ignore[return-value]


def _inverse_rms(row: Tensor, eps: float) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` of each row, `[..., 1]`."""
    norm = torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return torch.rsqrt(norm * norm / row.shape[-1] + eps)


def _normed(x: Tensor, weight: Tensor, eps: float, wide: torch.dtype, dtype: torch.dtype) -> Tensor:
    row = x.to(wide)
    return (row * _inverse_rms(row, eps) * weight).to(dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, wide: torch.dtype, dtype: torch.dtype
    ) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.wide = eps, wide
        return _normed(x, weight, eps, wide, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        row, grad = x.to(ctx.wide), grads[0].to(ctx.wide)
        scale = _inverse_rms(row, ctx.eps)
        normal, inner = row * scale, grad * weight
        mean = (inner * normal).mean(-1, keepdim=True)
        g_x = torch.addcmul(inner, normal, mean, value=-1) * scale
        g_weight = (grad * normal).reshape(-1, row.shape[-1]).sum(0)
        return g_x.to(x.dtype), g_weight.to(weight.dtype), None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, wide: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Each row over its RMS, times `weight`, computed in `wide`, in `dtype` (Zhang and Sennrich 2019).

    Args:
        x: `[..., size]`.
        weight: `[size]`.
        eps: added to the mean of squares.
        wide: of the computation.
        dtype: of the result.
    """
    form = _RMSNorm.apply if pays(x, weight) else _normed
    return form(x, weight, eps, wide, dtype)  # type: ignore[return-value]
