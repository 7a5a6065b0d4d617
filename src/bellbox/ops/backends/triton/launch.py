"""The operations as launches of kernels: arguments checked as everywhere, sizes from `plan`, results made.

Nothing here reads a number back from the device, so that launches may be recorded in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bellbox.core.grid import Grid
from bellbox.core.packing import code_width
from bellbox.errors import BellboxError
from bellbox.ops.backends.triton import plan
from bellbox.ops.backends.triton.availability import interpreted
from bellbox.ops.backends.triton.kernels import activation as _activation
from bellbox.ops.backends.triton.kernels import fp4 as _fp4
from bellbox.ops.backends.triton.kernels import layout as _layout
from bellbox.ops.backends.triton.kernels import product as _product
from bellbox.ops.backends.triton.kernels import rows as _rows
from bellbox.ops.encode import SIGMA_FLOOR
from bellbox.ops.kept import MOST, STEPS, stepped
from bellbox.ops.packed_linear import check
from bellbox.ops.preconditions import check_rows
from bellbox.ops.weight_layout import check_codes, check_packed, packed_size, tiles_size

# Separate roundings: a fused multiply-add would round the scaled product and the bias once where the reference
# rounds twice.
OPTIONS = {"enable_fp_fusion": False}
# A function of Triton is launched by its subscript, which no type checker knows.
activation: Any = _activation
fp4: Any = _fp4
layout: Any = _layout
product: Any = _product
row_kernels: Any = _rows
_BAND = 8


@functools.lru_cache(maxsize=256)
def _table(numbers: tuple[float, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _on_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the current device, which need not be that of the tensors."""

    @functools.wraps(run)
    def on_device(*arguments: Any) -> Any:
        x = arguments[0]
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(x.device):
            return run(*arguments)

    return on_device


def _stored(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes for a result: the interpreter cuts fp32 down to bf16 where a GPU rounds, so torch rounds."""
    return torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype


def _stages(block: int) -> int:
    return block.bit_length() - 1


def _step(of_rows: Tensor) -> int:
    """From a row's number to the next one's: 0 where there is one for all."""
    return int(of_rows.numel() > 1)


# --- rows whose normaliser is given ---


def _by_piece(x: Tensor, block: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes of a kernel whose programs share out a row."""
    columns = x.shape[-1]
    size = plan.piece(columns, block)
    grid = x.numel() // columns, -(-columns // size)
    return grid, {"SIZE": size, "num_warps": plan.warps(size), **OPTIONS}


def row_rms(x: Tensor) -> Tensor:
    """See `bellbox.ops.encode.row_rms`."""
    out = x.new_empty((len(x), 1), dtype=torch.float64)
    size = min(plan.power_of_two(x.shape[1]), 4096)
    options = {"num_warps": plan.warps(size), **OPTIONS}
    row_kernels.row_rms[(len(x),)](x.contiguous(), out, x.shape[1], SIZE=size, **options)
    return out


def rotate(x: Tensor, factor: float, block: int, dtype: torch.dtype) -> Tensor:
    """See `bellbox.ops.rotate`."""
    check_rows(x, block)
    out = torch.empty(x.shape, dtype=_stored(dtype), device=x.device)
    grid, options = _by_piece(x, block)
    row_kernels.rotate[grid](x.contiguous(), out, factor, x.shape[-1], STAGES=_stages(block), **options)
    return out.to(dtype)


def encode(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    """See `bellbox.ops.encode`."""
    check_rows(x, block, r)
    out = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    grid, options = _by_piece(x, block)
    table = _table(tuple(thresholds), x.device)
    row_kernels.encode[grid](
        x.contiguous(), r.contiguous(), table, out, x.shape[1], _step(r),
        STAGES=_stages(block), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out


def keep(x: Tensor, r: Tensor, thresholds: Sequence[float], block: int) -> Tensor:
    """See `bellbox.ops.kept`."""
    check_rows(x, block, r)
    cuts = stepped(thresholds)
    assert cuts is not None
    starts = (-float(MOST), *(STEPS * cut for cut in cuts))
    ends = (*(start - 1 for start in starts[1:]), float(MOST))
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    grid, options = _by_piece(x, block)
    tables = (_table(tuple(each), x.device) for each in (thresholds, starts, ends))
    row_kernels.keep[grid](
        x.contiguous(), r.contiguous(), *tables, out, x.shape[1], _step(r),
        STAGES=_stages(block), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out


def kept_codes(kept: Tensor, thresholds: Sequence[float]) -> Tensor:
    """See `bellbox.ops.kept`."""
    out = torch.empty(kept.shape, dtype=torch.uint8, device=kept.device)
    size = min(plan.power_of_two(kept.numel()), 4096)
    row_kernels.kept_codes[(-(-kept.numel() // size),)](
        kept.contiguous(), _table(tuple(thresholds), kept.device), out, kept.numel(),
        SIZE=size, LEVELS=len(thresholds) + 1, num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    return out


def decode_kept(
    kept: Tensor, scale: Tensor, thresholds: Sequence[float], offset: float, dtype: torch.dtype
) -> Tensor:
    """See `bellbox.ops.kept`."""
    if scale.numel() not in (1, len(kept)):
        raise BellboxError(f"{tuple(scale.shape)} scales do not fit {len(kept)} rows")
    out = torch.empty(kept.shape, dtype=_stored(dtype), device=kept.device)
    grid, options = _by_piece(kept, 1)
    row_kernels.decode_kept[grid](
        kept.contiguous(), scale.contiguous(), _table(tuple(thresholds), kept.device), out, float(offset),
        kept.shape[1], _step(scale), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out.to(dtype)


def bbq_forward(
    x: Tensor,
    r: Tensor,
    scale: Tensor,
    thresholds: Sequence[float],
    offset: float,
    block: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `bellbox.ops.fake_quantize.reference_forward`."""
    check_rows(x, block, r, scale)
    out, value = (torch.empty(x.shape, dtype=_stored(dtype), device=x.device) for _ in range(2))
    grid, options = _by_piece(x, block)
    row_kernels.forward[grid](
        x.contiguous(), r.contiguous(), scale.contiguous(), _table(tuple(thresholds), x.device), out, value,
        float(offset), x.shape[1], _step(r), _step(scale),
        STAGES=_stages(block), LEVELS=len(thresholds) + 1, **options,
    )  # fmt: skip
    return out.to(dtype), value.to(dtype)


def _backward(
    grad: Tensor, value: Tensor, levels: Tensor, of_rows: tuple[Tensor, Tensor, Tensor], block: int,
    dtype: torch.dtype, thresholds: Sequence[float] = (0.0,), offset: float = 0.0, kept: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_rows(grad, block, *of_rows)
    if not grad.shape == value.shape == levels.shape:
        raise BellboxError(f"a gradient {tuple(grad.shape)} does not fit what was kept, {tuple(value.shape)}")
    r, gamma, free = (each.contiguous() for each in of_rows)
    out = torch.empty(grad.shape, dtype=_stored(dtype), device=grad.device)
    dots = grad.new_empty((len(grad), 1), dtype=torch.float32)
    size, whole = plan.whole_row(grad.shape[1], block)
    row_kernels.backward[(len(grad),)](
        grad.contiguous(), value.contiguous(), levels.contiguous(), _table(tuple(thresholds), grad.device),
        r, gamma, free, out, dots, float(offset), grad.shape[1], _step(r), _step(gamma), _step(free),
        SIZE=size, WHOLE=whole, STAGES=_stages(block), KEPT=kept, LEVELS=len(thresholds) + 1,
        num_warps=plan.row_warps(size), **OPTIONS,
    )  # fmt: skip
    return out.to(dtype), dots


def bbq_backward(
    grad: Tensor,
    v: Tensor,
    x_hat: Tensor,
    r: Tensor,
    gamma: Tensor,
    free: Tensor,
    block: int,
    whole_tensor: bool,
) -> tuple[Tensor, Tensor]:
    """See `bellbox.ops.fake_quantize.reference_backward`; sigma of each row."""
    assert not whole_tensor
    return _backward(grad, v, x_hat, (r, gamma, free), block, grad.dtype)


def bbq_backward_kept(
    grad: Tensor, kept: Tensor, r: Tensor, gamma: Tensor, free: Tensor, thresholds: Sequence[float], offset: float,
    block: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `bellbox.ops.kept.bbq_backward_kept`."""
    return _backward(grad, kept, kept, (r, gamma, free), block, dtype, thresholds, offset, kept=True)


# --- products ---


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


class Rows(NamedTuple):
    """Coded rows as a product reads them."""

    integers: Tensor
    """int8 in the order of the weights' fields, or uint8 planes."""
    padded: int
    """Columns of the integers."""
    sums: Tensor
    """int32 sums of the integers of each row."""
    scales: Tensor
    """fp32, what a row's product is multiplied with, or one for all."""
    act_scale: Tensor
    grid: Grid
    planes: int
    """Bit planes of a code; 0 where they are numbers."""
    fp4: bool = False
    """Whether they are e2m1, two in a byte."""


def _shift(grid: Grid) -> int:
    return int(grid.multiplier * grid.offset)


def on_planes(rows: int, weights: int, inputs: int, on: plan.Gpu = plan.INTERPRETED) -> bool:
    """Whether a product of so many rows, on grids of so many levels, runs on bit planes."""
    return rows <= plan.plane_rows(on) and max(weights, inputs) <= 4


def on_fp4(rows: int, weights: Grid, inputs: Grid, on: plan.Gpu) -> bool:
    """Whether a product runs on tensor cores for e2m1: where the GPU's table says so, and the integers are exact."""
    largest = max(abs(inputs.multiplier * code - _shift(inputs)) for code in (0, inputs.n - 1))
    # For sm_100 Triton 3.7 makes an empty program of weights of one bit.
    fitting = weights.n <= 8 and (weights.n > 2 or on.capability[0] != 10)
    return rows > plan.DECODE_ROWS and fitting and largest <= 4 and plan.fp4(on)


def code_rows(
    x: Tensor, weights: Weights, grid: Grid, act_scale: Tensor, thresholds: Tensor, act_rstd: Tensor | None,
    act_signs: Tensor | None, block: int, normalise: str, rescale: bool,
) -> Rows:  # fmt: skip
    """One launch: rows `[rows, columns]` as a product with these weights reads them."""
    (count, columns), on = x.shape, plan.gpu(x)
    planes = code_width(grid.n) if on_planes(count, weights.grid.n, grid.n, on) else 0
    field, group = weights.field, plan.group(weights.bits)
    padded = weights.blocks * 64 if planes else -(-weights.blocks // group) * group * 64
    pairs = not planes and on_fp4(count, weights.grid, grid, on)
    shape = (count, planes, padded // 8 * field) if planes else (count, padded // 2 if pairs else padded)
    out = x.new_empty(shape, dtype=torch.uint8 if planes or pairs else torch.int8)
    sums, scales = x.new_empty(count, dtype=torch.int32), x.new_empty(count, dtype=torch.float32)
    size, whole = plan.whole_row(columns, max(64 * group, block), plan.WHOLE_CODED_ROW)
    double = x.dtype == torch.float32 or on.fast_double
    warps = plan.coding_warps(size, whole, double)
    each = plan.rows_each(count, warps, on.processors)
    root = math.sqrt(block)
    activation.code_rows[(-(-count // each),)](
        x.contiguous(), act_signs, thresholds.contiguous(), act_rstd,
        _table((1 / columns, 1 / root), x.device, torch.float64), out, sums, scales, 1 / SIGMA_FLOOR / root,
        count, columns, padded, SIZE=size, WHOLE=whole, EVEN=columns % size == 0 == padded % size, ROWS=each,
        DOUBLE=double, STAGES=_stages(block), LEVELS=grid.n,
        MULTIPLIER=grid.multiplier, SHIFT=_shift(grid), NORMALISE=normalise, RESCALE=rescale,
        SIGNED=act_signs is not None, BITS=field, GROUP=group, PLANES=planes, FP4=pairs,
        num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return Rows(out, padded, sums, scales, act_scale, grid, planes, pairs)


def _arranged(
    kept: Tensor,
    row_scale: Tensor,
    weights: Weights,
    grid: Grid,
    act_scale: Tensor,
    thresholds: Sequence[float],
) -> Rows:
    count, columns = kept.shape
    field, group = weights.field, plan.group(weights.bits)
    padded = -(-weights.blocks // group) * group * 64
    out = kept.new_empty((count, padded))
    sums = kept.new_empty(count, dtype=torch.int32)
    size = min(plan.power_of_two(padded), 4096)
    activation.arrange[(count,)](
        kept.contiguous(), _table(tuple(thresholds), kept.device), out, sums, columns, padded,
        SIZE=size, LEVELS=grid.n, MULTIPLIER=grid.multiplier, SHIFT=_shift(grid), BITS=field, GROUP=group,
        num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    return Rows(out, padded, sums, row_scale.contiguous(), act_scale, grid, 0)


class _Epilogue(NamedTuple):
    """What a product becomes a result with."""

    scaling: tuple[Tensor, Tensor, Tensor, Tensor | None]
    row_step: int
    ends: dict[str, Any]


def _epilogue(rows: Rows, weights: Weights) -> _Epilogue:
    bias = None if weights.bias is None else weights.bias.contiguous()
    ends = {
        "MULTIPLIER": weights.grid.multiplier, "SHIFT": _shift(weights.grid),
        "WEIGHT_WORTH": 1 / weights.grid.multiplier, "ACT_WORTH": 1 / rows.grid.multiplier,
        "BIAS": bias is not None, **OPTIONS,
    }  # fmt: skip
    scaling = rows.scales, weights.scale.reshape(-1).contiguous(), rows.act_scale, bias
    return _Epilogue(scaling, _step(rows.scales), ends)


def multiply(rows: Rows, weights: Weights, dtype: torch.dtype, tiles: plan.Tiles | None = None) -> Tensor:
    """Coded rows times a weight, scaled: `[rows, outputs]` in `dtype`.

    Args:
        rows: coded for weights of this width.
        weights: what they are multiplied with.
        dtype: of the result.
        tiles: sizes; `plan` chooses where None.
    """
    if rows.planes:
        return _multiply_planes(rows, weights, dtype)
    if rows.fp4:
        return _multiply_fp4(rows, weights, dtype)
    count, outputs, on = len(rows.integers), weights.outputs, plan.gpu(rows.integers)
    least = plan.library_rows(on)
    if tiles is None and least is not None and count >= max(17, least) and outputs % 8 == 0:
        return multiply_by_library(rows, weights, dtype)
    chosen = tiles or plan.tiles(count, outputs, weights.columns, weights.bits, on)
    words, (scaling, row_step, ends) = _words(weights)[0], _epilogue(rows, weights)
    split = chosen.splits > 1
    kind = torch.int32 if split else _stored(dtype)
    target = words.new_empty((chosen.splits, count, outputs) if split else (count, outputs), dtype=kind)
    grid = -(-count // chosen.rows) * -(-outputs // chosen.outputs), chosen.splits
    product.multiply[grid](
        rows.integers, words, rows.sums, *scaling, target, count, outputs, weights.blocks, rows.padded, row_step,
        BITS=weights.bits, GROUP=plan.group(weights.bits), ROWS=chosen.rows, OUTPUTS=chosen.outputs,
        SPLITS=chosen.splits, BAND=_BAND, num_warps=chosen.warps, num_stages=chosen.stages, **ends,
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
    codes = rows.integers.new_empty((weights.outputs, rows.padded))
    size = min(plan.power_of_two(rows.padded), 1024)
    layout.unpack_in_place_of_rows[(weights.outputs, -(-rows.padded // size))](
        weights.packed.contiguous(), codes, weights.columns, rows.padded, weights.blocks,
        SIZE=size, BITS=weights.bits, GROUP=group, num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    total = torch._int_mm(rows.integers, codes.t())  # pyright: ignore[reportPrivateImportUsage]
    return _finished(total[None], rows, weights, dtype)


def _finished(partial: Tensor, rows: Rows, weights: Weights, dtype: torch.dtype) -> Tensor:
    """The result of integer sums `[pieces, rows, outputs]`."""
    pieces, count, outputs = partial.shape
    out = partial.new_empty((count, outputs), dtype=_stored(dtype))
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
    count, outputs = len(rows.integers), weights.outputs
    (words, _), (scaling, row_step, ends) = _words(weights), _epilogue(rows, weights)
    out = words.new_empty((count, outputs), dtype=_stored(dtype))
    chosen = plan.fp4_tiles(count)
    fp4.multiply_fp4[(-(-count // chosen.rows) * -(-outputs // chosen.outputs),)](
        rows.integers, words, rows.sums, *scaling, out, count, outputs, weights.blocks, rows.padded, row_step,
        BITS=weights.bits, GROUP=plan.group(weights.bits), ROWS=chosen.rows, OUTPUTS=chosen.outputs, BAND=_BAND,
        EMULATED=interpreted(), num_warps=chosen.warps, num_stages=chosen.stages, **ends,
    )  # fmt: skip
    return out.to(dtype)


def _multiply_planes(rows: Rows, weights: Weights, dtype: torch.dtype) -> Tensor:
    count, outputs = len(rows.integers), weights.outputs
    (words, behind), (scaling, row_step, ends) = _words(weights), _epilogue(rows, weights)
    out = words.new_empty((count, outputs), dtype=_stored(dtype))
    wide, some = plan.plane_tile(weights.blocks * 2 * weights.bits)
    product.multiply_planes[(count, -(-outputs // wide))](
        rows.integers.view(torch.int32), words, behind[: 4 * outputs].view(torch.int32), rows.sums, *scaling, out,
        count, outputs, weights.blocks, row_step, BITS=weights.bits, PLANES=rows.planes, OUTPUTS=wide, WORDS=some,
        ACT_MULTIPLIER=rows.grid.multiplier, ACT_SHIFT=_shift(rows.grid), num_warps=4, **ends,
    )  # fmt: skip
    return out.to(dtype)


def packed_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor, act_thresholds: Tensor,
    act_rstd: Tensor | None, act_signs: Tensor | None, in_features: int, weight_levels: int,
    weight_zero_point: float, act_zero_point: float, block: int, normalise: str, rescale: bool, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `bellbox.ops.packed_linear`."""
    tensors = weight, weight_scale, bias, act_scale, act_thresholds, act_rstd, act_signs
    numbers = in_features, weight_levels, weight_zero_point, act_zero_point, block, normalise, rescale
    return packed_linear_group(x, [(tensors, numbers)], dtype)[0]


def packed_linear_group(
    x: Tensor, layers: Sequence[tuple[tuple[Tensor | None, ...], tuple[Any, ...]]], dtype: torch.dtype
) -> list[Tensor]:
    """Packed layers that code their common input alike, at weights of one width: it is coded once.

    Args:
        x: `[..., in_features]`.
        layers: tensors and numbers of each, in the order of the schema of `bellbox.ops.packed_linear`.
        dtype: of the results.
    """
    for tensors, numbers in layers:
        check(x, *tensors, *numbers, features=numbers[0])  # type: ignore[arg-type]
    tensors, numbers = layers[0]
    columns, _, _, zero_point, *coding = numbers
    if x.dim() == 0 or x.shape[-1] != columns:
        raise BellboxError(f"a packed layer of {columns} inputs got shape {tuple(x.shape)}, dtype {x.dtype}")
    act_scale, thresholds, rstd, signs = tensors[3:]
    assert act_scale is not None
    assert thresholds is not None
    grid = Grid(thresholds.numel() + 1, zero_point)
    weights = [_weights(*each) for each in layers]
    given = x.detach().reshape(-1, columns)
    rows = code_rows(given, weights[0], grid, act_scale, thresholds, rstd, signs, *coding)
    outs = []
    for (own, _), weight in zip(layers, weights, strict=True):
        own_scale = own[3]
        assert own_scale is not None
        out = multiply(rows._replace(act_scale=own_scale), weight, dtype)
        outs.append(out.reshape(*x.shape[:-1], weight.outputs))
    return outs


def _weights(tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> Weights:
    weight, scale, bias = tensors[:3]
    assert weight is not None
    assert scale is not None
    return Weights(weight, scale, bias, Grid(numbers[1], numbers[2]), numbers[0])


def kept_linear(
    kept: Tensor, row_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor,
    thresholds: Sequence[float], weight_levels: int, weight_zero_point: float, act_zero_point: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `bellbox.ops.kept`."""
    check_packed(weight, weight_scale.numel(), kept.shape[1], weight_levels)
    if row_scale.numel() not in (1, len(kept)) or act_scale.numel() != 1:
        raise BellboxError(f"{tuple(row_scale.shape)} scales of rows do not fit {len(kept)} rows")
    if bias is not None and bias.numel() != weight_scale.numel():
        raise BellboxError(f"a bias of {bias.numel()} numbers does not fit {weight_scale.numel()} outputs")
    weights = Weights(weight, weight_scale, bias, Grid(weight_levels, weight_zero_point), kept.shape[1])
    grid = Grid(len(thresholds) + 1, act_zero_point)
    return multiply(_arranged(kept, row_scale, weights, grid, act_scale, thresholds), weights, dtype)


# --- the layout of weights ---


def prepack(codes: Tensor, levels: int, places: int) -> Tensor:
    """See `bellbox.ops.weight_layout`; a code too large for its bits is cut off rather than waited for and refused."""
    check_codes(codes, levels, places)
    rows, columns = codes.shape
    bits, blocks = code_width(levels), -(-columns // 64)
    codes = codes.contiguous()
    out = codes.new_empty(packed_size(rows, columns, levels, places))
    layout.prepack[(-(-rows // 16), blocks)](
        codes, out, rows, columns, blocks, BITS=bits, num_warps=2, **OPTIONS
    )
    if levels <= 4:
        sums = out[tiles_size(rows, columns, levels) :].view(torch.int32)
        for count, part in ((1, sums[:rows]), (places, sums[rows:])):
            if part.numel():
                size = min(plan.power_of_two(columns // count), 2048)
                layout.sums_of_rows[(rows, count)](
                    codes, part, rows, columns, count, SIZE=size, num_warps=plan.warps(size), **OPTIONS
                )
    return out


def unpack(weight: Tensor, rows: int, columns: int, levels: int) -> Tensor:
    """See `bellbox.ops.weight_layout`."""
    check_packed(weight, rows, columns, levels)
    codes = weight.new_empty(rows, columns)
    size = min(plan.power_of_two(columns), 1024)
    layout.unpack[(rows, -(-columns // size))](
        weight.contiguous(), codes, rows, columns, -(-columns // 64),
        SIZE=size, BITS=code_width(levels), num_warps=plan.warps(size), **OPTIONS,
    )  # fmt: skip
    return codes


TABLE: dict[str, Callable[..., Any]] = {
    name: _on_device(run)
    for name, run in {
        "packed_linear": packed_linear,
        "kept_linear": kept_linear,
        "row_rms": row_rms,
        "rotate": rotate,
        "encode": encode,
        "bbq_forward": bbq_forward,
        "bbq_backward": bbq_backward,
        "keep": keep,
        "kept_codes": kept_codes,
        "decode_kept": decode_kept,
        "bbq_backward_kept": bbq_backward_kept,
        "prepack": prepack,
        "unpack": unpack,
        "packed_linear_group": packed_linear_group,
    }.items()
}
