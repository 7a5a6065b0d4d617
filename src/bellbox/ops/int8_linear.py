"""A product with int8 weights, for heads and embeddings that are stored so; for evaluation: it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation
from bellbox.ops.rms_norm import check_width

INT8_COLUMNS = 8192
"""Longest row in the compiled kernels: 127 * 2047 * 8192 fits 32 bits."""
_SMALLEST = 1e-30


def check(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: a weight that is no matrix, an input of another width, scales of other rows.
    """
    if weight.dim() != 2 or scale.shape != weight.shape[:1]:
        raise BellboxError(f"an int8 layer of weight {tuple(weight.shape)} got scales {tuple(scale.shape)}")
    check_width("an int8 layer", x, weight.shape[1])


def _reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check(x, weight, scale)
    x = x.contiguous()
    largest = x.abs().amax(dim=-1, keepdim=True)
    usable = largest.isfinite() & (largest >= _SMALLEST)
    factor = x.new_tensor(2047.0) / largest  # with a plain number torch would multiply by the reciprocal
    integers = torch.where(usable, (x * factor).round(), 0.0)
    x_scale = torch.where(usable, largest / 2047.0, torch.where(largest.isfinite(), 0.0, float("nan")))
    outputs = [
        (integers.double() @ part.double().t()).to(torch.float32) for part in weight.split(4096)
    ]  # exact in fp64; a slab at a time, since fp64 weights take eight times the memory
    return torch.cat(outputs, dim=-1) * (scale * x_scale)


def _fake(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    del scale
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


operation = Operation("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor", _reference, _fake)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`x @ (weight * scale).T` with each row of `x` rounded to integers of 12 bits first; the integer sum is exact.

    A row's largest magnitude becomes 2047, so that rounding the row costs far less than the int8 of the weights did. A
    row with NaN or infinity gives NaN.

    Args:
        x: `[..., columns]` fp32.
        weight: `[rows, columns]` int8.
        scale: `[rows]` fp32.

    Returns:
        `[..., rows]` fp32.

    Raises:
        BellboxError: another number of columns than the weight's, or of scales than its rows.
    """
    return operation.direct(x, weight, scale)
