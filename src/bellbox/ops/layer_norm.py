"""LayerNorm between packed layers, for evaluation: it has no gradient. See `ops/rms_norm.py`, its fellow."""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation
from bellbox.ops.rms_norm import check_width

_LANES = 16


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: another number of features than weights, or than biases.
    """
    if weight.dim() != 1 or (bias is not None and bias.shape != weight.shape):
        raise BellboxError(
            f"a norm got {tuple(weight.shape)} weights, {None if bias is None else tuple(bias.shape)} biases"
        )
    check_width("a norm", x, len(weight))


def _sum(x: Tensor) -> Tensor:
    """Over the last dimension `[..., k]`, kept: sixteen lanes, which are added in halves."""
    k = x.shape[-1]
    lanes = x.new_zeros((*x.shape[:-1], _LANES))
    for begin in range(0, k, _LANES):
        some = x[..., begin : begin + _LANES]
        lanes[..., : some.shape[-1]] += some
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    check(x, weight, bias)
    wide, count = x.detach().contiguous().double(), len(weight)
    off = wide - _sum(wide) / count
    factor = 1.0 / (_sum(off * off) / count + eps).sqrt()
    out = off * factor * weight.detach().double()
    return (out if bias is None else out + bias.detach().double()).to(torch.float32)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    del weight, bias, eps
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


operation = Operation(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", _reference, _fake
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` in fp64, rounded once: the same bits on every kernel path.

    Args:
        x: `[..., features]` fp32.
        weight: `[features]` fp32.
        bias: likewise, or None.
        eps: added to the variance, the mean of squares.

    Returns:
        fp32, the shape of `x`.

    Raises:
        BellboxError: see `check`.
    """
    return operation.direct(x, weight, bias, eps)
