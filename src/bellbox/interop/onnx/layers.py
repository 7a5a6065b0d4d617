"""Packed linear layers and convolutions in standard operators, bit for bit (docs/format.md, packed_linear).

Integers are multiplied by MatMulInteger. Convolutions multiply the same integers as floats, whose sums below 2^24 are
exact in any order: onnxruntime's ConvInteger takes 6 times as long. Scales are never next to a Conv, where
onnxruntime would fold them into its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bellbox.core.grid import Grid
from bellbox.interop.onnx.coding import Coded, Rule, code
from bellbox.interop.onnx.graph import Builder, numbers_of
from bellbox.interop.onnx.placeholders import DOMAIN
from bellbox.ops.weight_layout import unpack

if TYPE_CHECKING:
    import onnx_ir as ir

_EXACT = 2**24
"""Whole numbers below it are floats, and so are their sums in any order."""
_PAIR = 2**15
"""Processors without VNNI add two products of bytes in 16 bits, which saturate there."""


def packed_linear(b: Builder, inputs: list[ir.Value | None], numbers: dict[str, Any]) -> ir.Value:
    """The node `packed_linear`: see `ops.packed_linear`."""
    x, weight, weight_scale, bias, act_scale = inputs[:5]
    assert x is not None
    assert weight is not None
    rule, columns = _rule(b, inputs, numbers), numbers["in_features"]
    if b.custom_op and _fits_custom_op(rule, numbers):
        return _custom_op(b, inputs, rule, numbers)
    coded = _coded(b, x, rule, columns, (-1,))
    weights = Grid(numbers["weight_levels"], numbers["weight_zero_point"])
    codes = _codes(b, weight, _size(weight_scale), columns, weights.n)
    matrix = _once(b, (weight, "matrix"), lambda: _weight(b, codes.T, weights, "INT8"))
    sums = product(b, coded.codes, rule.grid, matrix, codes.T, weights)
    scale = _scale(b, weight_scale, act_scale, weights, rule.grid)
    out = b.op("Mul", b.cast(sums, "FLOAT"), b.constant(scale, np.float32))
    out = b.op("Mul", out, coded.row_scale)
    return out if bias is None else b.op("Add", out, bias)


_CUSTOM_LEVELS, _CUSTOM_INTEGER = 16, 34  # what native/onnx/packed_linear.cpp takes
_CUSTOM_NORMALISE = ("rms", "absmax", "static")


def _fits_custom_op(rule: Rule, numbers: dict[str, Any]) -> bool:
    """Whether the operator of native/onnx computes such a layer."""
    return (
        numbers["weight_levels"] <= _CUSTOM_LEVELS
        and rule.grid.n <= _CUSTOM_LEVELS
        and _largest(rule.grid) <= _CUSTOM_INTEGER
        and rule.normalise in _CUSTOM_NORMALISE
    )


def _custom_op(b: Builder, inputs: list[ir.Value | None], rule: Rule, numbers: dict[str, Any]) -> ir.Value:
    """The layer as one node `bellbox::PackedLinear`; what it has not is an empty constant."""
    x, weight, weight_scale, bias, act_scale, thresholds, rstd = inputs[:7] + [None] * (7 - len(inputs[:7]))
    none = b.constant(np.zeros(0), np.float32)
    if rule.signs is not None:
        x = b.op("Mul", x, b.constant(np.frombuffer(rule.signs, np.int8), np.float32))
    weights = Grid(numbers["weight_levels"], numbers["weight_zero_point"])
    out = b.op(
        "PackedLinear",
        *(x, weight, weight_scale, bias or none, act_scale, thresholds, rstd or none),
        domain=DOMAIN,
        in_features=numbers["in_features"],
        weight_levels=weights.n,
        weight_twice=round(2 * weights.offset),
        act_twice=round(2 * rule.grid.offset),
        block=rule.block,
        normalise=_CUSTOM_NORMALISE.index(rule.normalise),
        rescale=int(rule.rescale),
    )
    assert inputs[0] is not None
    b.coded[b.name] = inputs[0], out
    return out


def packed_conv2d(b: Builder, inputs: list[ir.Value | None], numbers: dict[str, Any]) -> ir.Value:
    """The node `packed_conv2d`: see `ops.packed_conv2d`."""
    x, weight, weight_scale, bias, act_scale = inputs[:5]
    add = inputs[8] if len(inputs) > 8 else None
    assert x is not None
    assert weight is not None
    kh, kw, sh, sw, left, right, top, bottom, dh, dw, groups = numbers["geometry"]
    channels, columns = numbers["channels"], numbers["in_features"]
    rule = _rule(b, inputs, numbers, groups)
    sizes = None if x.shape is None else list(x.shape)[1:]
    known = sizes is not None and all(isinstance(size, int) for size in sizes)
    pixels = _once(b, (x, "pixels"), lambda: b.op("Transpose", x, perm=[0, 2, 3, 1]))
    features = int(np.prod(sizes)) if known and sizes is not None else None  # pyright: ignore[reportArgumentType, reportCallIssue]
    coded = _coded(b, pixels, rule, features, (1, 2, 3))
    weights = Grid(numbers["weight_levels"], numbers["weight_zero_point"])
    codes = _codes(b, weight, _size(weight_scale), columns, weights.n)
    filters = codes.reshape(len(codes), kh, kw, channels // groups).transpose(0, 3, 1, 2)
    window = {"strides": [sh, sw], "pads": [top, left, bottom, right], "dilations": [dh, dw], "group": groups}
    most = columns * _largest(rule.grid) * _largest(weights)
    if most < _EXACT:
        levels = _once(b, (coded.codes, "image"), lambda: _image(b, coded.codes, rule.grid))
        sums = b.op("Conv", levels, _weight(b, filters, weights, "FLOAT"), **window)
    else:
        taken, shift = _unsigned(b, coded.codes, rule.grid)
        taken = b.op("Transpose", taken, perm=[0, 3, 1, 2])
        zero = b.constant(shift, np.uint8)
        sums = b.cast(
            b.op("ConvInteger", taken, _weight(b, filters, weights, "INT8"), zero, **window), "FLOAT"
        )
    scale = _scale(b, weight_scale, act_scale, weights, rule.grid).reshape(1, -1, 1, 1)
    # 1 or NaN first: a constant factor next to a Conv would be folded into its weights.
    one = b.op("Where", coded.finite, b.constant(1, np.float32), b.constant(np.nan, np.float32))
    out = b.op("Mul", sums, b.op("Mul", one, b.constant(scale, np.float32)))
    if rule.rescale:
        out = b.op("Mul", out, coded.row_scale)
    if bias is not None:
        out = b.op("Add", out, b.op("Reshape", bias, b.constant([1, -1, 1, 1], np.int64)))
    out = out if add is None else b.op("Add", out, add)
    return b.op("Relu", out) if numbers["relu"] else out


def _once(b: Builder, key: Any, make: Any) -> Any:
    """What a node before has made, or what is made now."""
    if key not in b.memo:
        b.memo[key] = make()
    return b.memo[key]


def _rule(b: Builder, inputs: list[ir.Value | None], numbers: dict[str, Any], groups: int = 1) -> Rule:
    thresholds, rstd, signs = (numbers_of(inputs[i] if i < len(inputs) else None, b.name) for i in (5, 6, 7))
    assert thresholds is not None
    return Rule(
        tuple(thresholds.tolist()),
        numbers["act_zero_point"],
        numbers["block"],
        numbers["normalise"],
        bool(numbers["rescale"]),
        None if rstd is None else float(rstd.item()),
        None if signs is None else np.tile(signs, groups).tobytes(),
    )


def _coded(b: Builder, x: ir.Value, rule: Rule, features: int | None, axes: tuple[int, ...]) -> Coded:
    """Layers that read one tensor and code it alike share the codes."""
    coded = _once(b, (x, rule, axes), lambda: code(b, x, rule, features, axes))
    if all(found is not coded.codes for _, found in b.coded.values()):
        b.coded[b.name] = x, coded.codes
    return coded


def _size(value: ir.Value | None) -> int:
    assert value is not None
    assert value.shape is not None
    return int(np.prod(value.shape.numpy()))


def _codes(b: Builder, weight: ir.Value, rows: int, columns: int, levels: int) -> np.ndarray:
    packed = numbers_of(weight, b.name)
    return unpack(torch.from_numpy(np.array(packed)), rows, columns, levels).numpy()


def _scale(
    b: Builder, weight_scale: ir.Value | None, act_scale: ir.Value | None, weights: Grid, inputs: Grid
) -> np.ndarray:
    """What one integer of the product is worth, fp32 `[rows]`, in the order of roundings of the format."""
    of_rows, of_input = numbers_of(weight_scale, b.name), numbers_of(act_scale, b.name)
    assert of_rows is not None
    assert of_input is not None
    return (of_rows.reshape(-1) / np.float32(weights.multiplier)) * (
        of_input.reshape(())[()] / np.float32(inputs.multiplier)
    )


def _largest(grid: Grid) -> int:
    return max(map(abs, grid.integers))


def _unsigned(b: Builder, codes: ir.Value, grid: Grid) -> tuple[ir.Value, int]:
    """`multiplier * code` as bytes, and what is subtracted from them to give the integers."""
    scaled = codes if grid.multiplier == 1 else b.op("Mul", codes, b.constant(grid.multiplier, np.float32))
    return b.cast(scaled, "UINT8"), round(grid.multiplier * grid.offset)


def _image(b: Builder, codes: ir.Value, grid: Grid) -> ir.Value:
    """The integers of pixels as floats, channels in front again."""
    scaled = codes if grid.multiplier == 1 else b.op("Mul", codes, b.constant(grid.multiplier, np.float32))
    integers = b.op("Sub", scaled, b.constant(grid.multiplier * grid.offset, np.float32))
    return b.op("Transpose", integers, perm=[0, 3, 1, 2])


def _weight(b: Builder, codes: np.ndarray, grid: Grid, to: str) -> ir.Value:
    """Integers of a weight as INT8 or FLOAT, from a constant of as few bits as hold the codes.

    onnxruntime computes this once, while it loads.
    """
    name, width = b.unique("weight"), 2 if grid.n <= 4 else 4 if grid.n <= 16 else 8
    stored_width = max(width, int(b.weights[3:]))
    integers = np.array(grid.integers, np.int16)
    if -(2 ** (stored_width - 1)) <= integers.min() and integers.max() < 2 ** (stored_width - 1):
        stored = b.small_integers(name, integers[codes], width)
        return stored if to == "INT8" and stored_width == 8 else b.cast(stored, to)
    half = 2 ** (width - 1)
    stored = b.small_integers(name, codes.astype(np.int16) - half, width)
    # Signed codes to integers: m * (stored + half - offset).
    kind, number = ("INT32", np.int32) if to == "INT8" else ("FLOAT", np.float32)
    value = b.cast(stored, kind)
    if grid.multiplier > 1:
        value = b.op("Mul", value, b.constant(grid.multiplier, number))
    shift = round(grid.multiplier * (half - grid.offset))
    value = b.op("Add", value, b.constant(shift, number)) if shift else value
    return b.cast(value, to) if kind != to else value


def product(
    b: Builder, codes: ir.Value, inputs: Grid, matrix: ir.Value, weight: np.ndarray, weights: Grid
) -> ir.Value:
    """Integers of an input times those of a weight, INT32 `[..., out]`.

    Args:
        b: takes the nodes.
        codes: fp32 `[..., in]`, of the input.
        inputs: what they stand for.
        matrix: INT8 `[in, out]`, integers of a weight.
        weight: uint8 codes `[in, out]` of them.
        weights: what they stand for.
    """
    key = (codes, inputs, "bytes")
    taken, shift = _once(b, key, lambda: _unsigned(b, codes, inputs))
    zero = b.constant(shift, np.uint8) if 0 <= shift <= 255 else None
    highest = inputs.multiplier * (inputs.n - 1)
    if 2 * highest * _largest(weights) < _PAIR:
        sums = b.op("MatMulInteger", taken, matrix, zero)
    else:
        # In two halves of the weight, so that no pair of products leaves 16 bits.
        wide = b.cast(matrix, "FLOAT")
        high = b.op("Floor", b.op("Mul", wide, b.constant(1 / 16, np.float32)))
        low = b.op("Sub", wide, b.op("Mul", high, b.constant(16, np.float32)))
        parts = [b.op("MatMulInteger", taken, b.cast(part, "INT8"), zero) for part in (high, low)]
        sums = b.op("Add", b.op("Mul", parts[0], b.constant(16, np.int32)), parts[1])
    if zero is not None:
        return sums
    total = np.array(weights.integers, np.int64)[weight].sum(0)
    return b.op("Sub", sums, b.constant(shift * total, np.int32))
