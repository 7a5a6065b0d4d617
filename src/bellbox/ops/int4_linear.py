"""A product with integers of 4 bits by groups, for heads that are stored so; for evaluation: it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.core.table import TABLE_GROUPS, TableCodes, table_integers
from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation
from bellbox.ops.int8_linear import exact_product, round_input
from bellbox.ops.rms_norm import check_width

INT4_COLUMNS = 8192
"""Longest row: 8 * 255 * 127 * 8192 fits 32 bits."""
INPUT_MOST = 127
"""What the largest magnitude of a row of the input becomes."""


def check(x: Tensor, weight: Tensor, multipliers: Tensor, scale: Tensor) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: tables that are no uint8 matrices of as many rows, groups of other sizes than 32 or 64, rows too
            long, an input of another width.
    """
    shapes = tuple(weight.shape), tuple(multipliers.shape), tuple(scale.shape)
    if weight.dim() != 2 or multipliers.dim() != 2 or len({len(weight), len(multipliers), *shapes[2]}) != 1:
        raise BellboxError(
            f"a 4-bit layer of weight {shapes[0]} got multipliers {shapes[1]}, scales {shapes[2]}"
        )
    if (weight.dtype, multipliers.dtype) != (torch.uint8, torch.uint8):
        raise BellboxError(f"a 4-bit layer takes uint8 tables, not {weight.dtype} and {multipliers.dtype}")
    columns, groups = 2 * weight.shape[1], multipliers.shape[1]
    if not groups or columns % groups or columns // groups not in TABLE_GROUPS or columns > INT4_COLUMNS:
        raise BellboxError(
            f"a 4-bit layer takes groups of 32 or 64 of at most {INT4_COLUMNS} columns, not {groups} of {columns}"
        )
    check_width("a 4-bit layer", x, columns)


def _reference(x: Tensor, weight: Tensor, multipliers: Tensor, scale: Tensor) -> Tensor:
    check(x, weight, multipliers, scale)
    integers, x_scale = round_input(x.contiguous(), INPUT_MOST)
    slabs = zip(weight.split(4096), multipliers.split(4096), scale.split(4096), strict=True)
    return exact_product(integers, (table_integers(TableCodes(*slab)) for slab in slabs)) * (scale * x_scale)


def _fake(x: Tensor, weight: Tensor, multipliers: Tensor, scale: Tensor) -> Tensor:
    del multipliers, scale
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


operation = Operation(
    "int4_linear(Tensor x, Tensor weight, Tensor multipliers, Tensor scale) -> Tensor", _reference, _fake
)


def int4_linear(x: Tensor, weight: Tensor, multipliers: Tensor, scale: Tensor) -> Tensor:
    """`x @ table.T` with each row of `x` rounded to integers of 8 bits first; the integer sum is exact.

    A row's largest magnitude becomes 127. A row with NaN or infinity gives NaN.

    Args:
        x: `[..., columns]` fp32.
        weight: `[rows, columns / 2]` uint8, see `bellbox.core.table.TableCodes`.
        multipliers: `[rows, columns / group]` uint8.
        scale: `[rows]` fp32.

    Returns:
        `[..., rows]` fp32.

    Raises:
        BellboxError: shapes that do not fit together.
    """
    return operation.direct(x, weight, multipliers, scale)
