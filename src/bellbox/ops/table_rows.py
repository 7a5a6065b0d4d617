"""Rows of a rounded embedding as numbers; for evaluation: it has no gradient.

In a decode step it is one row, for which six operations of torch take longer than a block of a small model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.core.table import TableCodes, table_values
from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation, is_direct


def check(ids: Tensor, weight: Tensor, multipliers: Tensor | None, scale: Tensor) -> None:
    """Refuse arguments that are no ids and no table.

    Raises:
        BellboxError: ids that are not whole numbers, tables of other dtypes, or whose sizes do not fit together.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise BellboxError(f"rows of a table are named by int64 numbers, not {ids.dtype}")
    wanted = (torch.int8, None) if multipliers is None else (torch.uint8, torch.uint8)
    if (weight.dtype, None if multipliers is None else multipliers.dtype) != wanted:
        raise BellboxError("a table is int8, or uint8 with uint8 multipliers")
    tables = [weight] if multipliers is None else [weight, multipliers]
    if any(t.dim() != 2 for t in tables) or scale.dim() != 1 or len({len(t) for t in (*tables, scale)}) != 1:
        raise BellboxError(f"a table of weight {tuple(weight.shape)} got scales {tuple(scale.shape)}")
    if scale.dtype != torch.float32:
        raise BellboxError(f"scales of a table are fp32, not {scale.dtype}")
    columns = weight.shape[1] * len(tables)
    groups = 1 if multipliers is None else multipliers.shape[1]
    if not columns or not groups or columns % groups or (columns // groups) % len(tables):
        raise BellboxError(f"{groups} groups do not divide the {columns} columns of a table")


def _reference(ids: Tensor, weight: Tensor, multipliers: Tensor | None, scale: Tensor) -> Tensor:
    check(ids, weight, multipliers, scale)
    try:
        rows = F.embedding(ids, weight)
    except IndexError:
        raise BellboxError(outside(weight)) from None
    groups = None if multipliers is None else F.embedding(ids, multipliers)
    return table_values(TableCodes(rows, groups, scale[ids]))


def outside(weight: Tensor) -> str:
    """What is said of an id that is none."""
    return f"a token is outside of the embedding's {len(weight)} rows"


def _fake(ids: Tensor, weight: Tensor, multipliers: Tensor | None, scale: Tensor) -> Tensor:
    columns = weight.shape[1] * (1 if multipliers is None else 2)
    return scale.new_empty((*ids.shape, columns))


operation = Operation(
    "table_rows(Tensor ids, Tensor weight, Tensor? multipliers, Tensor scale) -> Tensor", _reference, _fake
)


def table_rows(ids: Tensor, codes: TableCodes) -> Tensor:
    """What rows of a table stand for, `scale * multiplier * integer`, rounded once: the same bits on every path.

    A compiler sees torch's own operations, which it fuses.

    Args:
        ids: int64 `[...]`, which rows.
        codes: the table.

    Returns:
        fp32 `[..., columns]`.

    Raises:
        BellboxError: an id that is no row.
    """
    return operation.direct(ids, *codes) if is_direct(ids) else _reference(ids, *codes)
