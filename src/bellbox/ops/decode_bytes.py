"""Rows of packed codes as the numbers that they stand for, by a table of all bytes; it has no gradient.

A layer whose weight alone is codes decodes it in each call, which by torch's own operations takes far longer than
the product of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation


def check(packed: Tensor, values: Tensor, scale: Tensor, columns: int) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: other dtypes, a table that has not 256 rows, rows of another length, scales that do not divide it.
    """
    if packed.dim() != 2 or packed.dtype != torch.uint8:
        raise BellboxError(f"packed rows are uint8 [rows, bytes], not {packed.dtype} {tuple(packed.shape)}")
    if values.dim() != 2 or len(values) != 256 or not values.shape[1] or values.dtype != torch.float32:
        raise BellboxError(f"values of bytes are fp32 [256, codes], not {values.dtype} {tuple(values.shape)}")
    if columns < 1 or packed.shape[1] != -(-columns // values.shape[1]):
        raise BellboxError(
            f"{packed.shape[1]} bytes of {values.shape[1]} codes do not make {columns} columns"
        )
    if scale.dim() != 2 or scale.dtype != torch.float32 or len(scale) != len(packed):
        raise BellboxError(f"{len(packed)} rows have scales {tuple(scale.shape)}, {scale.dtype}")
    if not scale.shape[1] or columns % scale.shape[1]:
        raise BellboxError(f"{scale.shape[1]} scales do not divide {columns} columns")


def _reference(packed: Tensor, values: Tensor, scale: Tensor, columns: int) -> Tensor:
    check(packed, values, scale, columns)
    rows = values[packed.long()].flatten(1)[:, :columns]
    grouped = rows.reshape(len(packed), scale.shape[1], columns // scale.shape[1])
    return (grouped * scale[:, :, None]).reshape(len(packed), columns)


def _fake(packed: Tensor, values: Tensor, scale: Tensor, columns: int) -> Tensor:
    del values
    return scale.new_empty(len(packed), columns)


operation = Operation(
    "decode_bytes(Tensor packed, Tensor values, Tensor scale, int columns) -> Tensor", _reference, _fake
)


def decode_bytes(packed: Tensor, values: Tensor, scale: Tensor, columns: int) -> Tensor:
    """What packed codes stand for, times their scale: one rounding.

    Args:
        packed: uint8 `[rows, bytes]`, each byte as many codes.
        values: fp32 `[256, codes]`, what the codes of each byte stand for.
        scale: fp32 `[rows, groups]`, of columns / groups columns each.
        columns: of a row; the last byte may hold more.

    Returns:
        fp32 `[rows, columns]`.

    Raises:
        BellboxError: arguments that do not fit together.
    """
    return operation.direct(packed, values, scale, columns)
