"""Bytes that training on integers keeps of a coded tensor: one a number, which tells code and value.

The backward of Bell Box Quantization needs the normalised rotated value v, and a product's backward the code. A byte
holds both: v in steps of 1/32, from -127 to 127 of them. The nearest step may have another code than v; then the
nearest one with the same code is taken. So the code is exact. v is off by 1/64 at most, beside a threshold by 1/32;
beyond 3.97 it counts as 3.97, where the bell's slope is below 0.0002.

Thresholds t become `ceil(32 t) / 32`: the first step that has reached them. With codes in place of steps, and
thresholds 1/32, 2/32, ..., the same operations serve any grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bellbox.core.grid import Grid
from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation
from bellbox.ops.encode import chunks, compute_dtype, count_reached, per_row, rotate_normalise
from bellbox.ops.fake_quantize import reference_backward
from bellbox.ops.integer import scaled_product
from bellbox.ops.preconditions import check_rows
from bellbox.ops.weight_layout import check_packed, unpack_operation

STEPS = 32
"""Steps in one sigma."""
MOST = 127
"""The outermost step."""


def stepped(thresholds: Sequence[float]) -> tuple[float, ...] | None:
    """Thresholds as steps see them, or None where steps do not tell them apart.

    Args:
        thresholds: n-1 rising fp32 numbers.
    """
    steps = [-MOST, *(math.ceil(STEPS * t) if math.isfinite(t) else MOST + 1 for t in thresholds)]
    rising = all(a < b for a, b in itertools.pairwise(steps))
    return tuple(step / STEPS for step in steps[1:]) if rising and steps[-1] <= MOST else None


def thresholds_of_codes(n: int) -> tuple[float, ...]:
    """Thresholds for which codes 0..n-1 are steps with their own codes; n is at most 128."""
    return tuple(code / STEPS for code in range(1, n))


def _reference_keep(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    check_rows(x, block, r)
    cuts = stepped(thresholds)
    if cuts is None:
        raise BellboxError("bytes do not tell these thresholds apart: they must be 1/32 apart, within 3.97")
    kept = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    starts = torch.tensor([-MOST, *(STEPS * t for t in cuts)], device=x.device)
    ends = torch.cat((starts[1:] - 1, starts.new_tensor([MOST])))
    for rows in chunks(x):
        v = rotate_normalise(x[rows], per_row(r, rows), block)
        code = count_reached(v, thresholds, torch.empty_like(v), torch.empty_like(v)).long()
        steps = torch.where(v.isnan(), -MOST, (v.to(torch.float32) * STEPS).round())
        kept[rows] = steps.clamp(-MOST, MOST).clamp(starts[code], ends[code]).to(torch.int8)
    return kept


keep = Operation(
    "keep(Tensor x, Tensor r, float[] thresholds, int block) -> Tensor",
    _reference_keep,
    lambda x, r, thresholds, block: torch.empty(x.shape, dtype=torch.int8, device=x.device),  # noqa: ARG005 (as the operation)
)
"""Rows as bytes: x `[rows, features]`, r `[rows, 1]` or `[1, 1]` and thresholds as `bellbox::encode` takes them.

Returns int8 `[rows, features]`; -127 for NaN.
"""


def _check_kept(kept: Tensor) -> None:
    if kept.dim() != 2 or kept.dtype != torch.int8:
        raise BellboxError(
            f"kept bytes are {kept.dtype} {tuple(kept.shape)}: int8 [rows, features] is needed"
        )


def _codes(kept: Tensor, thresholds: Sequence[float]) -> Tensor:
    steps = kept.to(torch.float32) / STEPS
    return count_reached(steps, thresholds, torch.empty_like(steps), torch.empty_like(steps))


def _reference_codes(kept: Tensor, thresholds: Sequence[float]) -> Tensor:
    _check_kept(kept)
    return _codes(kept, thresholds).to(torch.uint8)


kept_codes = Operation(
    "kept_codes(Tensor kept, float[] thresholds) -> Tensor",
    _reference_codes,
    lambda kept, thresholds: torch.empty(kept.shape, dtype=torch.uint8, device=kept.device),  # noqa: ARG005
)
"""uint8 codes of kept bytes `[rows, features]`; thresholds as `stepped` gives them, here and below."""


def _reference_decode(
    kept: Tensor, scale: Tensor, thresholds: Sequence[float], offset: float, dtype: torch.dtype
) -> Tensor:
    _check_kept(kept)
    if scale.numel() not in (1, len(kept)):
        raise BellboxError(f"{tuple(scale.shape)} scales do not fit {len(kept)} rows")
    return ((_codes(kept, thresholds) - offset) * scale.reshape(-1, 1)).to(dtype)


decode_kept = Operation(
    "decode_kept(Tensor kept, Tensor scale, float[] thresholds, float offset, ScalarType dtype) -> Tensor",
    _reference_decode,
    lambda kept, scale, thresholds, offset, dtype: torch.empty(kept.shape, dtype=dtype, device=kept.device),  # noqa: ARG005
)
"""`scale * (code - offset)`: kept `[rows, features]`, scale fp32 `[rows, 1]` or `[1, 1]`."""


def _reference_product(
    grad: Tensor, kept: Tensor, scale: Tensor, thresholds: Sequence[float], offset: float, transposed: bool
) -> Tensor:
    rows = grad.t() if transposed else grad
    if rows.dim() != 2 or rows.shape[1] != len(kept):
        raise BellboxError(f"a gradient {tuple(grad.shape)} does not fit kept bytes {tuple(kept.shape)}")
    return rows @ decode_kept(kept, scale, thresholds, offset, grad.dtype)


def _fake_product(grad: Tensor, kept: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty((grad.shape[1] if rest[-1] else grad.shape[0], kept.shape[1]))


kept_product = Operation(
    "kept_product(Tensor grad, Tensor kept, Tensor scale, float[] thresholds, float offset, bool transposed) -> Tensor",
    _reference_product,
    _fake_product,
)
"""`grad @ decode_kept(...)`, or `grad.t() @ ...`: what a product's backward multiplies the gradient with.

One operation, so that no compiler decodes in the forward what the backward needs, and keeps it.
"""


def _reference_backward(
    grad: Tensor,
    kept: Tensor,
    r: Tensor,
    gamma: Tensor,
    free: Tensor,
    thresholds: Sequence[float],
    offset: float,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_kept(kept)
    v = kept.to(compute_dtype(grad)) / STEPS
    levels = _codes(kept, thresholds) - offset
    wide = grad if dtype == grad.dtype else grad.to(compute_dtype(grad))
    grad_x, dots = reference_backward(wide, v, levels, r, gamma, free, block, whole_tensor=False)
    return grad_x.to(dtype), dots


bbq_backward_kept = Operation(
    "bbq_backward_kept(Tensor grad, Tensor kept, Tensor r, Tensor gamma, Tensor free, float[] thresholds, float offset,"
    " int block, ScalarType dtype) -> (Tensor, Tensor)",
    _reference_backward,
    lambda grad, kept, r, *rest: (  # noqa: ARG005
        torch.empty_like(grad, dtype=rest[-1]),
        r.new_empty((grad.shape[0], 1)),
    ),
)
"""`bellbox::bbq_backward` with sigma of each row, from kept bytes, to `dtype`. The second result is
`sum(grad * (code - offset))` of each row."""


def _reference_linear(
    kept: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor,
    thresholds: Sequence[float], weight_levels: int, weight_zero_point: float, act_zero_point: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    _check_kept(kept)
    outputs, columns = weight_scale.numel(), kept.shape[1]
    check_packed(weight, outputs, columns, weight_levels)
    inputs, weights = Grid(len(thresholds) + 1, act_zero_point), Grid(weight_levels, weight_zero_point)
    product = scaled_product(
        inputs.decode_int8(_codes(kept, thresholds).to(torch.uint8)),
        weights.decode_int8(unpack_operation.reference(weight, outputs, columns, weight_levels)),
        weight_scale.reshape(-1) / weights.multiplier,
        act_scale.reshape(()).to(torch.float32) / inputs.multiplier,
        row_scale.reshape(-1, 1),
    )
    return (product if bias is None else product + bias.to(torch.float32)).to(dtype)


kept_linear = Operation(
    "kept_linear(Tensor kept, Tensor row_scale, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor act_scale,"
    " float[] thresholds, int weight_levels, float weight_zero_point, float act_zero_point, ScalarType dtype)"
    " -> Tensor",
    _reference_linear,
    lambda kept, row_scale, weight, weight_scale, *rest: kept.new_empty(  # noqa: ARG005
        (kept.shape[0], weight_scale.numel()), dtype=rest[-1]
    ),
)
"""`bellbox::packed_linear` of an input that is coded already, to the same bits.

kept int8 `[rows, columns]`, row_scale fp32 `[rows, 1]` or `[1, 1]`: what a row's product is multiplied with; the rest
as there. Returns `[rows, outputs]`.
"""
