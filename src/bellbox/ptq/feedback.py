"""Binarizing a matrix block by block, each block's error fed to the columns that come after it.

When a block's weights W_b have become Q_b, the later columns can take up a part of the error: with E U_bb = W_b - Q_b,
taking E U_b,later from them minimises the error of the layer's output exactly, for weights that were fixed together
(U: `hessian.py`). That is what `clean` does. The authors' code, `released`, divides by the diagonal of U_bb in place of
solving with all of it, as if the block's columns had been fixed one at a time, each with its own feedback inside the
block, which they were not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.core.binarize import BLOCK, Binarized, Variant, binarize, decode, round_to_two


def binarize_matrix(
    weight: Tensor,
    upper: Tensor | None,
    variant: Variant = "clean",
    block: int = BLOCK,
    scale_dtype: torch.dtype = torch.float16,
) -> tuple[list[Binarized], Tensor]:
    """Binarize a weight matrix.

    Args:
        weight: float `[out, in]`; left as it is.
        upper: U, `[in, in]`; None rounds to nearest, without search or feedback.
        variant: `released` or `clean`.
        block: columns of a block.
        scale_dtype: of the stored scales.

    Returns:
        the blocks from left to right, and the weights `[out, in]` that they stand for.
    """
    work = weight.clone()
    blocks: list[Binarized] = []
    for first in range(0, work.shape[1], block):
        last = min(first + block, work.shape[1])
        w = work[:, first:last]
        if upper is None:
            made = round_to_two(w, scale_dtype)
        else:
            made = binarize(w, upper.diagonal()[first:last], variant, scale_dtype)
        blocks.append(made)
        stands_for = decode(made, work.dtype)
        if upper is not None and last < work.shape[1]:
            error = _carried(w - stands_for, upper[first:last, first:last], variant)
            work[:, last:].addmm_(error, upper[first:last, last:], alpha=-1)
        w.copy_(stands_for)
    return blocks, work


def _carried(error: Tensor, corner: Tensor, variant: Variant) -> Tensor:
    if variant == "released":
        return error / corner.diagonal()
    return torch.linalg.solve_triangular(corner, error, upper=True, left=False)


def output_error(weight: Tensor, stands_for: Tensor, hessian: Tensor) -> float:
    """Squared error of the layer's outputs on the calibration text, relative to their squares."""
    difference = weight - stands_for
    wrong = ((difference @ hessian) * difference).sum()
    return float(wrong / ((weight @ hessian) * weight).sum().clamp(min=1e-30))
