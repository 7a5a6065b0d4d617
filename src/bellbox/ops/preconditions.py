"""Preconditions of operations on rows, on every backend alike."""

from __future__ import annotations

from torch import Tensor

from bellbox.errors import BellboxError


def check_rows(x: Tensor, block: int, *of_rows: Tensor) -> None:
    """Refuse rows that are no numbers, a block that does not divide them, and numbers of other rows.

    Args:
        x: `[..., features]`, floating.
        block: of the rotation, a power of two that divides `features`.
        of_rows: a number for each row, or one for all.

    Raises:
        BellboxError: naming what does not fit.
    """
    if not x.dim() or not x.is_floating_point():
        raise BellboxError(f"rows of floating numbers are taken, not {x.dtype} {tuple(x.shape)}")
    features = x.shape[-1]
    if block < 1 or block & (block - 1) or features % block:
        raise BellboxError(f"Hadamard block {block}: must be a power of two that divides {features} features")
    for each in of_rows:
        if each.numel() != 1 and each.numel() * features != x.numel():
            raise BellboxError(f"{tuple(each.shape)} numbers do not fit the rows of {tuple(x.shape)}")
