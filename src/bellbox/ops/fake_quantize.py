"""Fused fake quantization of Bell Box Quantization, forward and closed-form backward.

Written as a chain of torch operations under autograd, the method keeps about a dozen fp32 temporaries of the
size of its input. Here the forward keeps one, the normalised rotated value `v`, in the compute dtype of the
model (bf16 under autocast: no more than the input itself), and everything that the backward needs follows
from it.

As operations they are opaque to `torch.compile`, so the graph does not break and the
additions are the same ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bellbox.core.hadamard import butterfly_between, hadamard_matrix
from bellbox.ops.batching import rows_rule, rows_together, samples_rule
from bellbox.ops.dispatch import Operation
from bellbox.ops.encode import Scratch, chunks, compute_dtype, count_reached, per_row, rotate_normalise
from bellbox.ops.preconditions import check_rows

_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def reference_forward(
    x: Tensor,
    r: Tensor,
    scale: Tensor,
    thresholds: Sequence[float],
    offset: float,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`x_hat = scale * (code - offset)` in the rotated domain.

    Args:
        x: `[rows, features]`, any floating dtype.
        r: `[rows, 1]` or `[1, 1]`, compute dtype; NaN makes its rows NaN.
        scale: `[rows, 1]` or `[1, 1]`, compute dtype: gamma / (n/2).
        thresholds: n-1 rising fp32 numbers.
        offset: n/2 + zero point.
        block: rotation block.
        dtype: of both results.

    Returns:
        `x_hat` and the normalised rotated `v`, both `[rows, features]` in `dtype`.
    """
    check_rows(x, block, r, scale)
    x_hat = torch.empty(x.shape, dtype=dtype, device=x.device)
    kept = torch.empty(x.shape, dtype=dtype, device=x.device)
    scratch = Scratch(x, 4, compute_dtype(x))
    marked = scale * (r - r + 1)  # NaN where the normaliser is not finite: a comparison would swallow it
    for rows in chunks(x):
        a, b, c, d = scratch.rows(rows)
        v = rotate_normalise(x[rows], per_row(r, rows), block, (a, b))
        kept[rows] = v
        x_hat[rows] = count_reached(v, thresholds, c, d).sub_(offset).mul_(per_row(marked, rows))
    return x_hat, kept


def _fake_forward(
    x: Tensor,
    r: Tensor,
    scale: Tensor,
    thresholds: Sequence[float],
    offset: float,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    del r, scale, thresholds, offset, block
    x_hat = torch.empty(x.shape, dtype=dtype, device=x.device)
    return x_hat, torch.empty_like(x_hat)


@functools.cache
def _matrix(block: int, device: torch.device) -> Tensor:
    return hadamard_matrix(block, torch.bfloat16, device)


def _soft_gradient(grad: Tensor, v: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """`g_v = 2 gamma phi(v) G` into `out`: the box is n Phi(v) and a level is gamma / (n/2), so n cancels."""
    torch.mul(v, v, out=out).mul_(-0.5).exp_().mul_(2 * _INV_SQRT_2PI * gamma)
    return out.mul_(grad)


def reference_backward(
    grad: Tensor,
    v: Tensor,
    x_hat: Tensor,
    r: Tensor,
    gamma: Tensor,
    free: Tensor,
    block: int,
    whole_tensor: bool,
) -> tuple[Tensor, Tensor]:
    """Closed-form backward to the input: straight-through in the rounding only, everything else differentiated.

    Args:
        grad: dL/dx_hat `[rows, features]`.
        v: what the forward kept, `[rows, features]`.
        x_hat: what the forward returned, `[rows, features]`.
        r: as in the forward.
        gamma: `[rows, 1]` or `[1, 1]`, compute dtype.
        free: the shape of `r`; 1 where sigma follows the input, 0 where it is constant (its floor, an EMA).
        block: rotation block.
        whole_tensor: sigma is taken over the whole tensor, else over each row.

    Returns:
        dL/dx `[rows, features]` in the dtype of `grad`, and `sum(grad * x_hat)` of each row, `[rows, 1]` in the
        compute dtype, which gives the gradient of gamma.
    """
    check_rows(grad, block, r, gamma, free)
    grad_x, dots = torch.empty_like(grad), torch.empty((len(grad), 1), dtype=r.dtype, device=grad.device)
    scratch = Scratch(grad, 5, r.dtype)
    # bf16 gradients: one small matrix product is cheaper than seven passes, at the gradient's own precision.
    matrix = _matrix(block, grad.device) if grad.dtype == torch.bfloat16 and block > 1 else None

    whole_mean: Tensor | None = None
    if whole_tensor:
        total = torch.zeros((), dtype=torch.float64, device=grad.device)
        for rows in chunks(grad):
            a, b, c, _, _ = scratch.rows(rows)
            g_v = _soft_gradient(b.copy_(grad[rows]), a.copy_(v[rows]), per_row(gamma, rows), c)
            total += g_v.mul_(a).sum(dtype=torch.float64)
        whole_mean = (total / max(1, grad.numel())).to(r.dtype) * free

    for rows in chunks(grad):
        a, b, c, d, e = scratch.rows(rows)
        g_v = _soft_gradient(b.copy_(grad[rows]), a.copy_(v[rows]), per_row(gamma, rows), c)
        dots[rows] = d.copy_(x_hat[rows]).mul_(b).sum(-1, keepdim=True)
        mean = whole_mean
        if mean is None:
            mean = torch.mul(g_v, a, out=d).mean(-1, keepdim=True) * per_row(free, rows)
        g_v.sub_(a.mul_(mean)).mul_(per_row(r, rows))
        if block == 1:
            grad_x[rows] = g_v
        elif matrix is not None:
            torch.mm(g_v.to(torch.bfloat16).view(-1, block), matrix, out=grad_x[rows].view(-1, block))
        else:
            grad_x[rows] = butterfly_between(g_v, block, (d, e))
    return grad_x, dots


def _fake_backward(
    grad: Tensor,
    v: Tensor,
    x_hat: Tensor,
    r: Tensor,
    gamma: Tensor,
    free: Tensor,
    block: int,
    whole_tensor: bool,
) -> tuple[Tensor, Tensor]:
    del v, x_hat, gamma, free, block, whole_tensor
    return torch.empty_like(grad), r.new_empty((grad.shape[0], 1))


bbq_forward = Operation(
    "bbq_forward(Tensor x, Tensor r, Tensor scale, float[] thresholds, float offset, int block, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    reference_forward,
    _fake_forward,
)
"""See `reference_forward`."""
bbq_backward = Operation(
    "bbq_backward(Tensor grad, Tensor v, Tensor x_hat, Tensor r, Tensor gamma, Tensor free, int block,"
    " bool whole_tensor) -> (Tensor, Tensor)",
    reference_backward,
    _fake_backward,
)
"""See `reference_backward`."""
_by_row, _whole = rows_rule(bbq_backward, range(6)), samples_rule(bbq_backward)


def _batched_backward(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    whole_tensor = args[-1]
    return (_whole if whole_tensor else _by_row)(info, in_dims, *args)


rows_together(bbq_forward, (0, 1, 2))
bbq_backward.register_vmap(_batched_backward)
