"""Heads and norms, rotations and weight-only layers in standard operators.

A head's input has integers of 12 bits beside int8 weights, or a weight of 12 bits (4 bits times a multiplier) beside
inputs of 8. Each is split into a high part and a low one of 6 bits, whose products MatMulInteger adds exactly on every
processor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bellbox.core import packing
from bellbox.interop.onnx import coding
from bellbox.interop.onnx.graph import Builder, numbers_of
from bellbox.ops.int4_linear import INPUT_MOST as INT4_MOST
from bellbox.ops.int8_linear import INPUT_MOST as INT8_MOST

if TYPE_CHECKING:
    import onnx_ir as ir

_LOW = 64
_LARGEST = 3.4028234663852886e38


def _rounded_input(b: Builder, x: ir.Value, most: int) -> tuple[ir.Value, ir.Value]:
    """Integers of rows, fp32, and what one is worth: `ops.int8_linear.round_input`."""
    last = b.constant([-1], np.int64)
    wide = b.cast(x, "DOUBLE")
    # A maximum may swallow a NaN; a sum does not.
    finite = b.op(
        "LessOrEqual",
        b.op("ReduceSumSquare", wide, last, keepdims=1),
        b.constant(1e300, np.float64),
    )
    largest = b.op("ReduceMax", b.op("Abs", x), last, keepdims=1)
    usable = b.op("And", finite, b.op("GreaterOrEqual", largest, b.constant(1e-30, np.float32)))
    bound, zero = b.constant(most, np.float32), b.constant(0, np.float32)
    rounded = b.op("Round", b.op("Mul", x, b.op("Div", bound, largest)))
    integers = b.op("Where", usable, rounded, zero)
    otherwise = b.op("Where", finite, zero, b.constant(np.nan, np.float32))
    return integers, b.op("Where", usable, b.op("Div", largest, bound), otherwise)


def _halves(b: Builder, integers: ir.Value) -> tuple[ir.Value, ir.Value]:
    """fp32 whole numbers as `64 high + low`, `low` from 0 to 63."""
    high = b.op("Floor", b.op("Mul", integers, b.constant(1 / _LOW, np.float32)))
    return high, b.op("Sub", integers, b.op("Mul", high, b.constant(_LOW, np.float32)))


def _together(b: Builder, high: ir.Value, low: ir.Value) -> ir.Value:
    return b.op("Add", b.op("Mul", high, b.constant(_LOW, np.int32)), low)


def int8_linear(b: Builder, inputs: list[ir.Value | None], _numbers: dict[str, Any]) -> ir.Value:
    """The node `int8_linear`: see `ops.int8_linear`."""
    x, weight, scale = inputs
    assert x is not None
    integers, worth = _rounded_input(b, x, INT8_MOST)
    b.coded[b.name] = x, integers
    high, low = _halves(b, integers)
    matrix = b.op("Transpose", weight, perm=[1, 0])
    raised = b.cast(b.op("Add", high, b.constant(32, np.float32)), "UINT8")
    sums = _together(
        b,
        b.op("MatMulInteger", raised, matrix, b.constant(32, np.uint8)),
        b.op("MatMulInteger", b.cast(low, "UINT8"), matrix),
    )
    return b.op("Mul", b.cast(sums, "FLOAT"), b.op("Mul", scale, worth))


def int4_linear(b: Builder, inputs: list[ir.Value | None], _numbers: dict[str, Any]) -> ir.Value:
    """The node `int4_linear`: see `ops.int4_linear`."""
    x, weight, multipliers, scale = inputs
    assert x is not None
    assert weight is not None
    assert multipliers is not None
    integers, worth = _rounded_input(b, x, INT4_MOST)
    b.coded[b.name] = x, integers
    raised = b.cast(b.op("Add", integers, b.constant(128, np.float32)), "UINT8")
    # What follows depends on constants alone: onnxruntime computes it once, while it loads.
    table = _table_integers(b, weight, multipliers, _columns(weight), _columns(multipliers))
    table = b.op("Transpose", table, perm=[1, 0])
    parts = [
        b.op("MatMulInteger", raised, b.cast(part, "INT8"), b.constant(128, np.uint8))
        for part in _halves(b, table)
    ]
    return b.op("Mul", b.cast(_together(b, *parts), "FLOAT"), b.op("Mul", scale, worth))


def int4_rows(b: Builder, inputs: list[ir.Value | None], _numbers: dict[str, Any]) -> ir.Value:
    """Rows of an embedding of 4 bits (`nn.compact.CompactEmbedding`)."""
    ids, weight, multipliers, scale = inputs
    rows, factors, worth = (b.op("Gather", each, ids, axis=0) for each in (weight, multipliers, scale))
    integers = _table_integers(b, rows, factors, _columns(weight), _columns(multipliers))
    values = b.op("Mul", integers, b.op("Reshape", worth, b.constant([-1, 1], np.int64)))
    width = b.constant([2 * _columns(weight)], np.int64)
    return b.op("Reshape", values, b.op("Concat", b.op("Shape", ids), width, axis=0))


def _columns(value: ir.Value | None) -> int:
    assert value is not None
    assert value.shape is not None
    return int(value.shape[1])  # pyright: ignore[reportArgumentType]


def _table_integers(b: Builder, packed: ir.Value, multipliers: ir.Value, half: int, groups: int) -> ir.Value:
    """`core.table.table_integers` of 4 bits: fp32 `[rows, 2 * half]`."""
    low = b.op("BitwiseAnd", packed, b.constant(15, np.uint8))
    high = b.op("BitShift", packed, b.constant(4, np.uint8), direction="RIGHT")
    pairs = [b.op("Unsqueeze", each, b.constant([-1], np.int64)) for each in (low, high)]
    codes = b.cast(b.op("Concat", *pairs, axis=-1), "FLOAT")
    grouped = b.op("Reshape", codes, b.constant([-1, groups, 2 * half // groups], np.int64))
    factors = b.op("Reshape", b.cast(multipliers, "FLOAT"), b.constant([-1, groups, 1], np.int64))
    values = b.op("Mul", b.op("Sub", grouped, b.constant(8, np.float32)), factors)
    return b.op("Reshape", values, b.constant([-1, 2 * half], np.int64))


def bf16_linear(b: Builder, inputs: list[ir.Value | None], _numbers: dict[str, Any]) -> ir.Value:
    """A head in bf16 (`nn.compact.CompactLinear`): onnxruntime has no such product on a CPU, so it is one of floats."""
    x, weight, bias = (*inputs, None)[:3]
    assert x is not None
    assert weight is not None
    rounded = b.cast(b.cast(x, "BFLOAT16"), "FLOAT")
    matrix = b.op("Transpose", b.cast(weight, "FLOAT"), perm=[1, 0])
    out = b.cast(b.cast(b.op("MatMul", rounded, matrix), "BFLOAT16"), "FLOAT")
    return out if bias is None else b.op("Add", out, bias)


def rms_norm(b: Builder, inputs: list[ir.Value | None], numbers: dict[str, Any]) -> ir.Value:
    """The node `rms_norm`: see `ops.rms_norm`; the mean in fp64."""
    x, weight = inputs
    assert x is not None
    assert weight is not None
    assert weight.shape is not None
    squares = b.op("ReduceSumSquare", b.cast(x, "DOUBLE"), b.constant([-1], np.int64), keepdims=1)
    mean = b.op("Div", squares, b.constant(float(weight.shape[0]), np.float64))  # pyright: ignore[reportArgumentType]
    root = b.op("Sqrt", b.op("Add", mean, b.constant(numbers["eps"], np.float64)))
    inverse = b.cast(b.op("Div", b.constant(1, np.float64), root), "FLOAT")
    return b.op("Mul", b.op("Mul", x, inverse), weight)


def rotate(b: Builder, inputs: list[ir.Value | None], numbers: dict[str, Any]) -> ir.Value:
    """The node `rotate`: see `ops.rotate`."""
    (x,) = inputs
    assert x is not None
    return b.op("Mul", coding.rotate(b, x, numbers["block"]), b.constant(numbers["factor"], np.float32))


def weight_only(b: Builder, inputs: list[ir.Value | None], numbers: dict[str, Any]) -> ir.Value:
    """A layer of codes that multiplies floats (`nn.weight_only`); its input is rotated already."""
    x, packed, scale, table, bias = (*inputs, None, None)[:5]
    columns, levels = numbers["columns"], numbers["levels"]
    rows = numbers_of(packed, b.name)
    assert rows is not None
    assert scale is not None
    codes = packing.unpack(torch.from_numpy(np.array(rows)), columns, levels).numpy()
    width = 2 if levels <= 4 else 4 if levels <= 16 else 8
    stored = b.small_integers(b.unique("weight"), codes, width, signed=False)
    if table is None:
        offset = b.constant(numbers["offset"], np.float32)
        values = b.op("Sub", b.cast(stored, "FLOAT"), offset)
    else:
        values = b.op("Gather", table, b.cast(stored, "INT32"))
    shape = [] if scale.shape is None else [int(size) for size in scale.shape]  # pyright: ignore[reportArgumentType]
    if len(shape) == 2:
        values = b.op("Reshape", values, b.constant([*shape, -1], np.int64))
    worth = b.op("Unsqueeze", scale, b.constant([-1], np.int64))
    values = b.op("Reshape", b.op("Mul", values, worth), b.constant([-1, columns], np.int64))
    out = b.op("MatMul", x, b.op("Transpose", values, perm=[1, 0]))
    return out if bias is None else b.op("Add", out, bias)
