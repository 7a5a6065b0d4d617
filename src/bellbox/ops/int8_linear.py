"""A product with int8 weights, for heads and embeddings that are stored so; for evaluation: it has no gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation
from bellbox.ops.rms_norm import check_width

INT8_COLUMNS = 8192
"""Longest row in the compiled kernels: 127 * 2047 * 8192 fits 32 bits."""
INPUT_MOST = 2047
"""What the largest magnitude of a row of the input becomes: 12 bits."""
_SMALLEST = 1e-30


def check(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: a weight that is no matrix, an input of another width, scales of other rows.
    """
    if weight.dim() != 2 or scale.shape != weight.shape[:1]:
        raise BellboxError(f"an int8 layer of weight {tuple(weight.shape)} got scales {tuple(scale.shape)}")
    check_width("an int8 layer", x, weight.shape[1])


def round_input(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows as integers with the largest magnitude at `most`: fp32 `[..., columns]`, and what one is worth, `[..., 1]`.

    Nearest, ties to even. A row with NaN or infinity is worth NaN, one below 1e-30 is all zeros.
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    usable = largest.isfinite() & (largest >= _SMALLEST)
    factor = x.new_tensor(float(most)) / largest  # with a plain number torch would multiply by the reciprocal
    integers = torch.where(usable, (x * factor).round(), 0.0)
    worth = torch.where(
        usable, largest / x.new_tensor(float(most)), torch.where(largest.isfinite(), 0.0, float("nan"))
    )
    return integers, worth


def exact_product(integers: Tensor, slabs: Iterable[Tensor]) -> Tensor:
    """Integers times the rows of all slabs, rounded to fp32 once: exact in fp64, which takes eight times the memory."""
    wide = integers.double()
    return torch.cat([(wide @ slab.double().t()).to(torch.float32) for slab in slabs], dim=-1)


def _reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    check(x, weight, scale)
    integers, x_scale = round_input(x.contiguous(), INPUT_MOST)
    return exact_product(integers, weight.split(4096)) * (scale * x_scale)


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
