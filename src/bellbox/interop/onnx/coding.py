"""The input of a packed layer in standard operators: rotate, normalise, compare with thresholds.

The rotation is the butterfly itself, stage after stage, not a product with the Hadamard matrix: a product adds in
another order, and values within rounding of a threshold then get another code. With the same additions the codes are
the same integers (docs/format.md has each step).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bellbox.core.grid import Grid
from bellbox.interop.onnx.graph import Builder
from bellbox.ops.encode import SIGMA_CEILING, SIGMA_FLOOR

if TYPE_CHECKING:
    import onnx_ir as ir

_COMPARED = 16
"""Most levels that are counted by one comparison a threshold; more are found by halving."""


@dataclass(frozen=True)
class Rule:
    """How an input is coded: what `ops.packed_linear` says of it, with constants."""

    thresholds: tuple[float, ...]
    zero_point: float
    block: int
    normalise: str
    rescale: bool
    rstd: float | None
    signs: bytes | None
    """int8, one for each entry that is rotated together."""

    @property
    def grid(self) -> Grid:
        """Of the codes."""
        return Grid(len(self.thresholds) + 1, self.zero_point)


@dataclass(frozen=True)
class Coded:
    """A coded input."""

    codes: ir.Value
    """fp32, whole numbers from 0 on, in the shape of the input."""
    finite: ir.Value
    """Bool, one a row: whether its numbers can be coded."""
    row_scale: ir.Value
    """fp32, one a row, what the product is multiplied with last; NaN where a row is not finite."""


def code(b: Builder, x: ir.Value, rule: Rule, features: int | None, axes: tuple[int, ...]) -> Coded:
    """Code rows of an input.

    Args:
        b: takes the nodes.
        x: fp32, runs of `block` entries along its last axis.
        rule: how.
        features: entries of a row where that is known.
        axes: of one row.
    """
    if rule.signs is not None:
        signs = np.frombuffer(rule.signs, np.int8)
        x = b.op("Mul", x, b.constant(signs, np.float32))
    wide, along = b.cast(x, "DOUBLE"), b.constant(axes, np.int64)
    squares = b.op("ReduceSumSquare", wide, along, keepdims=1)
    sigma = b.op("Div", b.op("Sqrt", squares), _root_of_count(b, x, features))
    ceiling = b.constant(SIGMA_CEILING, np.float64)
    finite = b.op("LessOrEqual", sigma, ceiling)
    if rule.normalise == "absmax":
        largest = b.op("ReduceMax", b.op("Abs", x), along, keepdims=1)
        sigma = b.cast(largest, "DOUBLE")
        finite = b.op("And", finite, b.op("LessOrEqual", sigma, ceiling))
    floored = b.op("Max", sigma, b.constant(SIGMA_FLOOR, np.float64))
    root = math.sqrt(rule.block)
    if rule.normalise == "static":
        assert rule.rstd is not None
        r = b.constant(np.float32(np.float64(rule.rstd) / root), np.float32)
    else:
        inverse = b.op("Div", b.constant(1, np.float64), floored)
        r = b.cast(b.op("Div", inverse, b.constant(root, np.float64)), "FLOAT")
    v = b.op("Mul", rotate(b, x, rule.block), r)
    codes = count_reached(b, v, rule.thresholds)
    scale = b.op("Where", finite, b.constant(1, np.float32), b.constant(math.nan, np.float32))
    if rule.normalise == "norm":
        scale = b.op("Mul", scale, _kept_norm(b, squares, codes, rule.grid, along))
    elif rule.rescale:
        scale = b.op("Mul", scale, b.cast(floored, "FLOAT"))
    return Coded(codes, finite, scale)


def _root_of_count(b: Builder, x: ir.Value, features: int | None) -> ir.Value:
    if features is not None:
        return b.constant(math.sqrt(features), np.float64)
    sizes = b.op("Shape", x, start=1)
    count = b.op("ReduceProd", sizes, b.constant([0], np.int64), keepdims=0)
    return b.op("Sqrt", b.cast(count, "DOUBLE"))


def _kept_norm(b: Builder, squares: ir.Value, codes: ir.Value, grid: Grid, along: ir.Value) -> ir.Value:
    """The L2 norm of a row over that of its levels; 0 where all of them are 0."""
    levels = b.op("Sub", b.cast(codes, "DOUBLE"), b.constant(grid.offset, np.float64))
    coded = b.op("Sqrt", b.op("ReduceSumSquare", levels, along, keepdims=1))
    zero = b.constant(0, np.float64)
    kept = b.op("Div", b.op("Sqrt", squares), coded)
    return b.cast(b.op("Where", b.op("Greater", coded, zero), kept, zero), "FLOAT")


def rotate(b: Builder, x: ir.Value, block: int) -> ir.Value:
    """The butterfly along the last axis of `x`, whose length is a multiple of `block`: stages 1, 2, ..., block/2."""
    if block == 1:
        return x
    shape, h = b.op("Shape", x), 1
    while h < block:
        pairs = b.op("Reshape", x, b.constant([-1, 2, h], np.int64))
        first, second = b.ops("Split", pairs, outputs=2, axis=1, num_outputs=2)
        x = b.op("Concat", b.op("Add", first, second), b.op("Sub", first, second), axis=1)
        h *= 2
    return b.op("Reshape", x, shape)


def count_reached(b: Builder, v: ir.Value, thresholds: tuple[float, ...]) -> ir.Value:
    """How many of the rising thresholds each value reaches, as fp32."""
    if len(thresholds) < _COMPARED:
        reached = [b.op("GreaterOrEqual", v, b.constant(t, np.float32)) for t in thresholds]
        counts = [b.cast(each, "FLOAT") for each in reached]
        return counts[0] if len(counts) == 1 else b.op("Sum", *counts)
    # The largest code whose threshold is reached: entry c of the table is the threshold of code c.
    bits = len(thresholds).bit_length()
    table = np.full(2**bits, np.inf, np.float32)
    table[0], table[1 : len(thresholds) + 1] = -np.inf, thresholds
    known, found = b.constant(table, np.float32), None
    for bit in reversed(range(bits)):
        step = b.constant(2**bit, np.int32)
        tried = step if found is None else b.op("Add", found, step)
        reached = b.op("GreaterOrEqual", v, b.op("Gather", known, tried))
        found = b.op("Where", reached, tried, b.constant(0, np.int32) if found is None else found)
    assert found is not None
    return b.cast(found, "FLOAT")
