"""The backward of rounding that passes straight through inside a clip range, with what a learned scale needs of it.

On a CPU in chunks of rows that stay in the cache, as `encode` says.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bellbox.ops.batching import rows_together
from bellbox.ops.dispatch import Operation
from bellbox.ops.encode import Scratch, chunks


def inside(grad: Tensor, v: Tensor, low: float, high: float, out: Tensor | None = None) -> Tensor:
    """`grad` where `low <= v <= high`, else 0; the ends count as fp32 numbers."""
    # The operation of torch leaves both ends out: give it the fp32 numbers next to them.
    low = float(np.nextafter(np.float32(low), np.float32(-math.inf)))
    high = float(np.nextafter(np.float32(high), np.float32(math.inf)))
    if out is None:
        return torch.ops.aten.hardtanh_backward(grad, v, low, high)
    return torch.ops.aten.hardtanh_backward.grad_input(grad, v, low, high, grad_input=out)


def reference_clip_backward(
    grad: Tensor, v: Tensor, x_hat: Tensor | None, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Gradient inside the clip range, and sums over each row.

    Args:
        grad: dL/dx_hat `[rows, features]`.
        v: what the clip range is laid on, likewise.
        x_hat: for the sums, likewise; None for none.
        low: first value inside.
        high: last value inside.

    Returns:
        `grad` inside the clip range and 0 outside, in its dtype; and `[rows, 3]` in fp32 (fp64 for fp64): the sums of
        `grad x_hat`, of `grad v` inside, of `grad sign(v)` outside; empty without `x_hat`.
    """
    if x_hat is None:
        return inside(grad, v, low, high), grad.new_empty(0)
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    passed, sums = torch.empty_like(grad), torch.empty(len(grad), 3, dtype=wide, device=grad.device)
    scratch = Scratch(grad, 4, wide)
    for rows in chunks(grad):
        g, u, kept, work = scratch.rows(rows)
        g.copy_(grad[rows])
        u.copy_(v[rows])
        inside(g, u, low, high, out=kept)
        passed[rows] = kept
        sums[rows, 0] = work.copy_(x_hat[rows]).mul_(g).sum(-1)
        sums[rows, 1] = torch.mul(kept, u, out=work).sum(-1)
        sums[rows, 2] = g.sub_(kept).mul_(u.sign_()).sum(-1)
    return passed, sums


def _fake(grad: Tensor, v: Tensor, x_hat: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor]:
    del v, low, high
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    sums = grad.new_empty(0) if x_hat is None else grad.new_empty((grad.shape[0], 3), dtype=wide)
    return torch.empty_like(grad), sums


clip_backward = Operation(
    "clip_backward(Tensor grad, Tensor v, Tensor? x_hat, float low, float high) -> (Tensor, Tensor)",
    reference_clip_backward,
    _fake,
)
"""See `reference_clip_backward`."""
rows_together(clip_backward, (0, 1, 2))
