"""Thresholds that are tensors because they are learned: coding with them, and their gradient.

An operation may look at the numbers in them (a graph that is being compiled may not), so the coding is that of every
other method. On a CPU in chunks of rows that stay in the cache, as `encode` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.core.grid import strictly_rising
from bellbox.errors import BellboxError
from bellbox.ops.batching import one_by_one, rows_together
from bellbox.ops.dispatch import Operation
from bellbox.ops.encode import Scratch, chunks, encode
from bellbox.ops.fake_quantize import bbq_forward
from bellbox.ops.preconditions import check_rows


def _encode(x: Tensor, r: Tensor, thresholds: Tensor) -> Tensor:
    """uint8 codes of `x r`, `[rows, features]`: `encode` without rotation.

    Args:
        x: `[rows, features]`.
        r: `[rows, 1]` or `[1, 1]`, compute dtype.
        thresholds: `[N]`, rising.
    """
    if thresholds.dim() != 1:
        raise BellboxError(f"thresholds are {tuple(thresholds.shape)}, must be a list of numbers")
    return encode(x, r, strictly_rising(thresholds.tolist()), 1)


def _fake_encode(x: Tensor, r: Tensor, thresholds: Tensor) -> Tensor:
    del r, thresholds
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device)


def _forward(
    x: Tensor, r: Tensor, scale: Tensor, thresholds: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`x_hat = scale * (code - N/2)` and `v = x r`, both `[rows, features]` in `dtype`.

    Args:
        x: `[rows, features]`.
        r: `[rows, 1]`, compute dtype; NaN makes its rows NaN.
        scale: `[1, 1]`, compute dtype.
        thresholds: `[N]`, rising.
        dtype: of the results.
    """
    count = len(thresholds)
    return bbq_forward(x, r, scale, thresholds.to(torch.float32).tolist(), count / 2, 1, dtype)


def _fake_forward(
    x: Tensor, r: Tensor, scale: Tensor, thresholds: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    del r, scale, thresholds
    x_hat = torch.empty(x.shape, dtype=dtype, device=x.device)
    return x_hat, torch.empty_like(x_hat)


def _backward(grad: Tensor, v: Tensor, edges: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient through a piecewise linear function, constant outside.

    Args:
        grad: `[rows, features]`.
        v: likewise.
        edges: `[N + 1]`, rising; interval i is from edge i (not in it) to edge i + 1.
        slopes: `[N]`, of the intervals.

    Returns:
        `grad * slope`, in the dtype of `grad`; and fp64 `[2, N]`: for each interval the sum of `grad * slope`, and of
        `grad * slope * (v - its first edge)`.
    """
    check_rows(grad, 1)
    if grad.shape != v.shape:
        raise BellboxError(f"a gradient of {tuple(grad.shape)} does not fit values of {tuple(v.shape)}")
    cuts, steps = edges.tolist(), torch.nn.functional.pad(slopes, (1, 1)).double().diff().tolist()
    above = torch.zeros(2, len(cuts), dtype=torch.float64, device=grad.device)
    out, scratch = torch.empty_like(grad), Scratch(grad, 5, edges.dtype)
    for rows in chunks(grad):
        g, u, gu, reached, slope = scratch.rows(rows)
        g.copy_(grad[rows])
        torch.mul(g, u.copy_(v[rows]), out=gu)
        slope.zero_()
        for i, (cut, step) in enumerate(zip(cuts, steps, strict=True)):
            torch.gt(u, cut, out=reached)
            slope.add_(reached, alpha=step)
            above[0, i] += torch.dot(reached.view(-1), g.view(-1)).double()
            above[1, i] += torch.dot(reached.view(-1), gu.view(-1)).double()
        out[rows] = slope.mul_(g)
    within = above[:, :-1] - above[:, 1:]
    into = within[1] - edges[:-1].double() * within[0]
    return out, torch.stack((within[0], into)) * slopes.double()


def _fake_backward(grad: Tensor, v: Tensor, edges: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    del v, edges
    return torch.empty_like(grad), grad.new_empty((2, slopes.shape[0]), dtype=torch.float64)


learned_encode = Operation(
    "learned_encode(Tensor x, Tensor r, Tensor thresholds) -> Tensor", _encode, _fake_encode
)
"""See `_encode`."""
learned_forward = Operation(
    "learned_forward(Tensor x, Tensor r, Tensor scale, Tensor thresholds, ScalarType dtype) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
)
"""See `_forward`."""
learned_backward = Operation(
    "learned_backward(Tensor grad, Tensor v, Tensor edges, Tensor slopes) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)
"""See `_backward`."""
rows_together(learned_encode, (0, 1))
rows_together(learned_forward, (0, 1, 2))
one_by_one(learned_backward)
