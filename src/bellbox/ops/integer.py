"""Integer matrix product and its epilogue: the reference for packed inference.

Evaluation of the fake-quantized model ends here, that of the packed one here or in the compiled kernels, which do
the same: the integer sum is exact, and the epilogue is separate fp32 roundings in a fixed order. That is what makes
them one function to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.utils.processor import fast_int8

# Read once, and as a constant: this is traced by compilers.
_INTEGER_UNITS = fast_int8()
_EXACT_COLUMNS = 1024
"""Columns of int8 whose partial sums fp32 holds in any order: 1024 * 128 * 128 = 2^24."""


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of small integers, exactly.

    Args:
        a: int8 `[M, K]`.
        b: int8 `[N, K]`.

    Returns:
        `[M, N]`, int32 where integer hardware is used, else a floating dtype that holds the sums exactly.
    """
    m, k = a.shape
    n = b.shape[0]
    if k == 1:
        # On CPUs torch._int_mm leaves its result unwritten where the stride of a dimension of size 1 misleads it
        # (pytorch issue 195066); one column is an outer product anyway.
        return a.to(torch.int32) * b.to(torch.int32).t()
    cuda = a.device.type == "cuda" and m > 16 and k % 8 == 0 and n % 8 == 0
    if cuda or (a.device.type == "cpu" and _INTEGER_UNITS):
        a, b = a.reshape(-1).view(m, k), b.reshape(-1).view(n, k)  # canonical strides, for the same reason
        return torch._int_mm(a, b.t())  # pyright: ignore[reportPrivateImportUsage]
    return float_matmul(a, b)


def float_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`integer_matmul`, of one pair or a batch of them, in fp32: of long rows in pieces, added up in fp64.

    What the sums hold is bounded by the dtype, not looked up: a look at the data would stop compilers and `vmap`.
    """
    with torch.autocast(a.device.type, enabled=False):
        total = _exact_product(a[..., :_EXACT_COLUMNS], b[..., :_EXACT_COLUMNS])
        for start in range(_EXACT_COLUMNS, a.shape[-1], _EXACT_COLUMNS):
            piece = slice(start, start + _EXACT_COLUMNS)
            total = total.to(torch.float64) + _exact_product(a[..., piece], b[..., piece])
        return total


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    return a.to(torch.float32) @ b.to(torch.float32).mT


def scaled_product(
    a: Tensor, b: Tensor, weight_scale: Tensor, act_scale: Tensor, row_scale: Tensor
) -> Tensor:
    """`float32(a @ b.T) * (weight_scale * act_scale) * row_scale`.

    Args:
        a: int8 `[M, K]`, integer levels of the activation.
        b: int8 `[N, K]`, integer levels of the weight.
        weight_scale: fp32 `[N]`, what one integer of a row is worth.
        act_scale: fp32 `[]`.
        row_scale: fp32 `[M, 1]`: 1.0, or NaN for rows whose input was not finite.

    Returns:
        fp32 `[M, N]`.
    """
    return integer_matmul(a, b).to(torch.float32) * (weight_scale * act_scale) * row_scale
