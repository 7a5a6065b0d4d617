"""A product in fp32 whose rows stand alone, for a head that is kept whole; for evaluation: it has no gradient.

A library's product sums in an order that depends on how many rows come together. Sequences that are decoded together
must each get the very logits that they would get alone, so here a row's sums are its own: sixteen lanes, added in a
fixed order, the same bits on every instruction set. The weight is read once for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation
from bellbox.ops.rms_norm import check_width

LANES = 16
"""Sums that a row is added up in, side by side."""
_SLAB = 4096
"""Outputs at once in the reference, which keeps all lanes."""


def check(x: Tensor, weight: Tensor) -> None:
    """Refuse arguments that do not fit together.

    Raises:
        BellboxError: a weight that is no matrix, an input of another width.
    """
    if weight.dim() != 2 or weight.dtype != torch.float32:
        raise BellboxError(f"a product in fp32 got a weight {tuple(weight.shape)}, {weight.dtype}")
    check_width("a product in fp32", x, weight.shape[1])


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    check(x, weight)
    rows = x.reshape(-1, 1, x.shape[-1])
    slabs = [_lanes(rows, slab) for slab in weight.split(_SLAB)]
    return torch.cat(slabs, dim=-1).view(*x.shape[:-1], len(weight))


def _lanes(x: Tensor, weight: Tensor) -> Tensor:
    """`[m, 1, k]` times `[n, k]`: `[m, n]`."""
    lanes = x.new_zeros(len(x), len(weight), LANES)
    for begin in range(0, weight.shape[1], LANES):
        products = x[..., begin : begin + LANES] * weight[:, begin : begin + LANES]
        lanes[..., : products.shape[-1]] += products
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


operation = Operation("float_linear(Tensor x, Tensor weight) -> Tensor", _reference, _fake)


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T`, each row of the result a function of that row of `x` alone, to the last bit.

    Args:
        x: `[..., columns]` fp32.
        weight: `[rows, columns]` fp32.

    Returns:
        `[..., rows]` fp32.

    Raises:
        BellboxError: another number of columns than the weight's, or another dtype.
    """
    return operation.direct(x, weight)
