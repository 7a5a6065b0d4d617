"""Launches that multiply coded rows with packed weights, each in the way that `plan` says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.availability import interpreted
from bellbox.ops.backends.triton.kernels import fp4 as _fp4
from bellbox.ops.backends.triton.kernels import layout as _layout
from bellbox.ops.backends.triton.kernels import product as _product
from bellbox.ops.backends.triton.launch.coding import Rows, Weights, shift_of
from bellbox.ops.backends.triton.launch.shared import OPTIONS, step, stored
from bellbox.ops.weight_layout import tiles_size

# A function of Triton is launched by its subscript, which no type checker knows.
fp4: Any = _fp4
layout: Any = _layout
product: Any = _product
BAND = 8
"""Columns of tiles that run beside each other, and so read the same rows."""


class _Epilogue(NamedTuple):
    """What a product becomes a result with."""

    scaling: tuple[Tensor, Tensor, Tensor, Tensor | None]
    row_step: int
    ends: dict[str, Any]


def _epilogue(rows: Rows, weights: Weights) -> _Epilogue:
    bias = None if weights.bias is None else weights.bias.contiguous()
    ends = {
        "MULTIPLIER": weights.grid.multiplier, "SHIFT": shift_of(weights.grid),
        "WEIGHT_WORTH": 1 / weights.grid.multiplier, "ACT_WORTH": 1 / rows.grid.multiplier,
        "BIAS": bias is not None, **OPTIONS,
    }  # fmt: skip
    scaling = rows.scales, weights.scale.reshape(-1).contiguous(), rows.act_scale, bias
    return _Epilogue(scaling, step(rows.scales), ends)


def multiply(rows: Rows, weights: Weights, dtype: torch.dtype, tiles: plan.Tiles | None = None) -> Tensor:
    """Coded rows times a weight, scaled: `[rows, outputs]` in `dtype`.

    Args:
        rows: coded for weights of this width.
        weights: what they are multiplied with.
        dtype: of the result.
        tiles: sizes; `plan` chooses where None.
    """
    if rows.form.kind == "planes":
        return _multiply_planes(rows, weights, dtype)
    if rows.form.kind == "e2m1":
        return _multiply_fp4(rows, weights, dtype)
    count, outputs, on = len(rows.numbers), weights.outputs, plan.gpu(rows.numbers)
    integers = rows.form.kind == "int8"
    least = plan.library_rows(on) if integers else None
    if tiles is None and least is not None and count >= max(17, least) and outputs % 8 == 0:
        return multiply_by_library(rows, weights, dtype)
    chosen = tiles or plan.tiles(count, outputs, weights.columns, weights.bits, on)
    words, (scaling, row_step, ends) = _words(weights)[0], _epilogue(rows, weights)
    split = chosen.splits > 1
    kind = torch.int32 if split else stored(dtype)
    target = words.new_empty((chosen.splits, count, outputs) if split else (count, outputs), dtype=kind)
    grid = -(-count // chosen.rows) * -(-outputs // chosen.outputs), chosen.splits
    product.multiply[grid](
        rows.numbers if integers else rows.numbers.view(torch.int32), words, rows.sums, *scaling, target,
        count, outputs, weights.blocks, rows.padded, row_step,
        BITS=weights.bits, GROUP=plan.group(weights.bits), ROWS=chosen.rows, OUTPUTS=chosen.outputs,
        SPLITS=chosen.splits, BAND=BAND, WIDTH=rows.form.width, ACT_MULTIPLIER=rows.grid.multiplier,
        ACT_SHIFT=shift_of(rows.grid), num_warps=chosen.warps, num_stages=chosen.stages, **ends,
    )  # fmt: skip
    return _finished(target, rows, weights, dtype) if split else target.to(dtype)


def multiply_by_library(rows: Rows, weights: Weights, dtype: torch.dtype) -> Tensor:
    """`multiply` as three launches: weights to int8, the product of torch's own library, the epilogue.

    Args:
        rows: more than 16, int8.
        weights: a number of outputs that 8 divides.
        dtype: of the result.
    """
    group = plan.group(weights.bits)
    codes = rows.numbers.new_empty((weights.outputs, rows.padded))
    size = min(plan.power_of_two(rows.padded), 1024)
    layout.unpack_in_place_of_rows[(weights.outputs, -(-rows.padded // size))](
        weights.packed.contiguous(), codes, weights.columns, rows.padded, weights.blocks,
        SIZE=size, BITS=weights.bits, GROUP=group, num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    total = torch._int_mm(rows.numbers, codes.t())  # pyright: ignore[reportPrivateImportUsage]
    return _finished(total[None], rows, weights, dtype)


def _finished(partial: Tensor, rows: Rows, weights: Weights, dtype: torch.dtype) -> Tensor:
    """The result of integer sums `[pieces, rows, outputs]`."""
    pieces, count, outputs = partial.shape
    out = partial.new_empty((count, outputs), dtype=stored(dtype))
    (scaling, row_step, ends), size = _epilogue(rows, weights), 256
    product.finish[(count, -(-outputs // size))](
        partial,
        rows.sums,
        *scaling,
        out,
        count,
        outputs,
        row_step,
        SIZE=size,
        SPLITS=pieces,
        num_warps=2,
        **ends,
    )
    return out.to(dtype)


def _words(weights: Weights) -> tuple[Tensor, Tensor]:
    """Packed weights as int32 words, and what stands behind the tiles of codes."""
    packed = weights.packed.contiguous()
    if packed.storage_offset() % 16 or packed.data_ptr() % 16:
        packed = packed.clone()
    end = tiles_size(weights.outputs, weights.columns, weights.grid.n)
    return packed[:end].view(torch.int32), packed[end:]


def _multiply_fp4(rows: Rows, weights: Weights, dtype: torch.dtype) -> Tensor:
    count, outputs = len(rows.numbers), weights.outputs
    (words, _), (scaling, row_step, ends) = _words(weights), _epilogue(rows, weights)
    out = words.new_empty((count, outputs), dtype=stored(dtype))
    chosen = plan.fp4_tiles(count)
    fp4.multiply_fp4[(-(-count // chosen.rows) * -(-outputs // chosen.outputs),)](
        rows.numbers, words, rows.sums, *scaling, out, count, outputs, weights.blocks, rows.padded, row_step,
        BITS=weights.bits, GROUP=plan.group(weights.bits), ROWS=chosen.rows, OUTPUTS=chosen.outputs, BAND=BAND,
        EMULATED=interpreted(), num_warps=chosen.warps, num_stages=chosen.stages, **ends,
    )  # fmt: skip
    return out.to(dtype)


def _multiply_planes(rows: Rows, weights: Weights, dtype: torch.dtype) -> Tensor:
    count, outputs = len(rows.numbers), weights.outputs
    (words, behind), (scaling, row_step, ends) = _words(weights), _epilogue(rows, weights)
    out = words.new_empty((count, outputs), dtype=stored(dtype))
    wide, some = plan.plane_tile(weights.blocks * 2 * weights.bits)
    product.multiply_planes[(count, -(-outputs // wide))](
        rows.numbers.view(torch.int32), words, behind[: 4 * outputs].view(torch.int32), rows.sums, *scaling, out,
        count, outputs, weights.blocks, row_step, BITS=weights.bits, PLANES=rows.form.width, OUTPUTS=wide, WORDS=some,
        ACT_MULTIPLIER=rows.grid.multiplier, ACT_SHIFT=shift_of(rows.grid), num_warps=4, **ends,
    )  # fmt: skip
    return out.to(dtype)
