"""Launches that make coded rows: integers, bit planes or e2m1, as the product that reads them wants them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bellbox.core.grid import Grid
from bellbox.core.packing import code_width
from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.kernels import activation as _activation
from bellbox.ops.backends.triton.launch.shared import OPTIONS, stages, table
from bellbox.ops.encode import SIGMA_FLOOR

# A function of Triton is launched by its subscript, which no type checker knows.
activation: Any = _activation


class Weights(NamedTuple):
    """A packed weight and its grid."""

    packed: Tensor
    scale: Tensor
    bias: Tensor | None
    grid: Grid
    columns: int

    @property
    def bits(self) -> int:
        """Of a code as it is stored."""
        return code_width(self.grid.n)

    @property
    def field(self) -> int:
        """Bits of a field of the layout, which the order of columns follows: three bits are two, and one apart."""
        return 2 if self.bits == 3 else self.bits

    @property
    def blocks(self) -> int:
        """Of 64 columns."""
        return -(-self.columns // 64)

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return self.scale.numel()


class Form(NamedTuple):
    """How coded rows stand in memory."""

    kind: Literal["int8", "packed", "planes", "e2m1"]
    width: int
    """Bits of a number: 8, 4, 2 or 1; of planes their number."""


class Rows(NamedTuple):
    """Coded rows as a product reads them."""

    numbers: Tensor
    """int8 integers, uint8 codes or e2m1 in the order of the weights' fields, or uint8 planes."""
    padded: int
    """Columns of them."""
    sums: Tensor
    """int32 sums of the integers of each row."""
    scales: Tensor
    """fp32, what a row's product is multiplied with, or one for all."""
    act_scale: Tensor
    grid: Grid
    form: Form = Form("int8", 8)


def shift_of(grid: Grid) -> int:
    """What is taken from `multiplier * code` to make the integer of a code."""
    return int(grid.multiplier * grid.offset)


def on_planes(rows: int, weights: int, inputs: int, on: plan.Gpu = plan.INTERPRETED) -> bool:
    """Whether a product of so many rows, on grids of so many levels, runs on bit planes."""
    return rows <= plan.plane_rows(on) and max(weights, inputs) <= 4


def on_fp4(rows: int, weights: Grid, inputs: Grid, on: plan.Gpu) -> bool:
    """Whether a product runs on tensor cores for e2m1: where the GPU's table says so, and the integers are exact."""
    largest = max(abs(inputs.multiplier * code - shift_of(inputs)) for code in (0, inputs.n - 1))
    # For sm_100 Triton 3.7 makes an empty program of weights of one bit.
    fitting = weights.n <= 8 and (weights.n > 2 or on.capability[0] != 10)
    return rows > plan.DECODE_ROWS and fitting and largest <= 4 and plan.fp4(on)


def form_of(rows: int, weights: Weights, inputs: Grid, on: plan.Gpu) -> Form:
    """How so many rows are coded for a product with these weights."""
    width = code_width(inputs.n)
    if on_planes(rows, weights.grid.n, inputs.n, on):
        return Form("planes", width)
    if on_fp4(rows, weights.grid, inputs, on):
        return Form("e2m1", 4)
    if plan.packs_rows(rows, on) and 0 <= shift_of(inputs) <= 127:
        # A byte holds no more fields than the weights have: those are what a step of the product meets.
        return Form("packed", max(weights.field, 4 if width == 3 else width))
    return Form("int8", 8)


def code_rows(
    x: Tensor, weights: Weights, grid: Grid, act_scale: Tensor, thresholds: Tensor, act_rstd: Tensor | None,
    act_signs: Tensor | None, block: int, normalise: str, rescale: bool,
) -> Rows:  # fmt: skip
    """One launch: rows `[rows, columns]` as a product with these weights reads them."""
    (count, columns), on = x.shape, plan.gpu(x)
    form = form_of(count, weights, grid, on)
    planes = form.width if form.kind == "planes" else 0
    field, group = weights.field, plan.group(weights.bits)
    padded = weights.blocks * 64 if planes else -(-weights.blocks // group) * group * 64
    shape = (count, planes, padded // 8 * field) if planes else (count, padded // 8 * form.width)
    out = x.new_empty(shape, dtype=torch.int8 if form.kind == "int8" else torch.uint8)
    sums, scales = x.new_empty(count, dtype=torch.int32), x.new_empty(count, dtype=torch.float32)
    size, whole = plan.whole_row(columns, max(64 * group, block), plan.WHOLE_CODED_ROW)
    double = x.dtype == torch.float32 or on.fast_double
    warps = plan.coding_warps(size, whole, double, few=count <= on.processors)
    each = plan.rows_each(count, warps, on.processors)
    root = math.sqrt(block)
    activation.code_rows[(-(-count // each),)](
        x.contiguous(), None if act_signs is None else act_signs.contiguous(), thresholds.contiguous(), act_rstd,
        table((1 / columns, 1 / root), x.device, torch.float64), out, sums, scales, 1 / SIGMA_FLOOR / root,
        count, columns, padded, SIZE=size, WHOLE=whole, EVEN=columns % size == 0 == padded % size, ROWS=each,
        DOUBLE=double, STAGES=stages(block), LEVELS=grid.n,
        MULTIPLIER=grid.multiplier, SHIFT=shift_of(grid), NORMALISE=normalise, RESCALE=rescale,
        SIGNED=act_signs is not None, BITS=field, GROUP=group, PLANES=planes, WIDTH=form.width,
        FP4=form.kind == "e2m1", num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return Rows(out, padded, sums, scales, act_scale, grid, form)


def arranged(
    kept: Tensor,
    row_scale: Tensor,
    weights: Weights,
    grid: Grid,
    act_scale: Tensor,
    thresholds: Sequence[float],
) -> Rows:
    """One launch: kept bytes `[rows, columns]` (`bellbox.ops.kept`) as a product with these weights reads them."""
    count, columns = kept.shape
    field, group = weights.field, plan.group(weights.bits)
    padded = -(-weights.blocks // group) * group * 64
    out = kept.new_empty((count, padded))
    sums = kept.new_empty(count, dtype=torch.int32)
    size = min(plan.power_of_two(padded), 4096)
    activation.arrange[(count,)](
        kept.contiguous(), table(tuple(thresholds), kept.device), out, sums, columns, padded,
        SIZE=size, LEVELS=grid.n, MULTIPLIER=grid.multiplier, SHIFT=shift_of(grid), BITS=field, GROUP=group,
        num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    return Rows(out, padded, sums, row_scale.contiguous(), act_scale, grid)
