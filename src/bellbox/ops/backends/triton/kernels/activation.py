"""Rows of floats to integers in one launch: statistic, rotation, thresholds, codes and the row's scale.

A program holds a row in registers, or passes over a long one twice.
"""
# Triton's language looks like Python and is none: `tl.constexpr` is a number, a pointer plus a number a pointer.
# So types are not checked here (`ignore` of pyright in pyproject.toml).

from __future__ import annotations

import triton
import triton.language as tl

from bellbox.ops.backends.triton.kernels.fp4 import e2m1
from bellbox.ops.backends.triton.kernels.steps import butterfly, cuts_of, planes, reached, store_fields


@triton.jit
def _values(x, signs, column, columns, SIGNED: tl.constexpr):
    """fp32 numbers of the row at x."""
    inside = column < columns
    v = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    if SIGNED:
        v = v * tl.load(signs + column, mask=inside, other=1).to(tl.float32)
    return v


@triton.jit
def _coded(
    v, first, cuts, out, columns, padded,
    SIZE: tl.constexpr, EVEN: tl.constexpr, LEVELS: tl.constexpr, MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, WIDTH: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """Writes the codes of SIZE normalised values from column `first` on to the row at `out`; returns their integers.

    Behind the row both are zero.
    """
    integer = reached(v, cuts, LEVELS, MULTIPLIER, SHIFT)
    code = (integer + SHIFT) // MULTIPLIER
    if not EVEN:
        inside = first + tl.arange(0, SIZE) < columns
        integer, code = tl.where(inside, integer, 0), tl.where(inside, code, 0)
    if PLANES:
        planes(code, first, out, padded // 32 * BITS, SIZE, BITS, PLANES)
    else:
        value = e2m1(integer) if FP4 else (integer if WIDTH == 8 else code)
        store_fields(out, first, value, padded, SIZE, BITS, GROUP, WIDTH)
    return integer


@triton.jit
def _two_sums(a, a_error, b, b_error):
    """Sum of two numbers with what its rounding, and theirs, left out."""
    total = a + b
    of_b = total - a
    return total, (a_error + b_error) + ((a - (total - of_b)) + (b - of_b))


@triton.jit
def _squares_in_double(x, SIZE: tl.constexpr):
    # Squares of fp32 are exact in fp64, so a fused addition rounds as a separate one does.
    if SIZE < 4:
        wide = x.to(tl.float64)
        total = tl.sum(wide * wide)
    else:
        a, b = tl.split(tl.reshape(x, [SIZE // 2, 2]))
        a, c = tl.split(tl.reshape(a, [SIZE // 4, 2]))
        b, d = tl.split(tl.reshape(b, [SIZE // 4, 2]))
        a, b, c, d = a.to(tl.float64), b.to(tl.float64), c.to(tl.float64), d.to(tl.float64)
        total = tl.sum(tl.fma(a, a, tl.fma(b, b, tl.fma(c, c, d * d))))
    return total


@triton.jit
def _squares(x, SIZE: tl.constexpr, DOUBLE: tl.constexpr):
    """fp64 sum of squares; without DOUBLE of numbers of 16 bits, whose squares are exact in fp32.

    Then two fp32 numbers hold the sum, to about 2^-48, where a GPU has few units for fp64. Squares that leave the range
    of fp32 are added up in fp64.
    """
    if DOUBLE:
        total = _squares_in_double(x, SIZE)
    else:
        most, error = tl.reduce((x * x, tl.zeros([SIZE], tl.float32)), 0, _two_sums)
        total = most.to(tl.float64) + error.to(tl.float64)
        if not (most < 1e37):
            total = _squares_in_double(x, SIZE)
    return total


@triton.jit
def _inverse_root(x):
    """fp64 `x ** -0.5` to two units, for 1e-16 to 1e60: two steps of Newton's from the fp32 approximation.

    Triton's own branches for what does not come here, and spills around the call.
    """
    large = x > tl.full([], 1e30, tl.float64)
    x = tl.where(large, x * tl.full([], 2.0**-120, tl.float64), x)
    y = tl.rsqrt(x.to(tl.float32)).to(tl.float64)
    one, half = tl.full([], 1.0, tl.float64), tl.full([], 0.5, tl.float64)
    for _ in tl.static_range(0, 2):
        y = tl.fma(y * half, tl.fma(x * y, -y, one), y)
    return tl.where(large, y * tl.full([], 2.0**-60, tl.float64), y)


@triton.jit
def code_rows(
    x, signs, thresholds, rstd, constants, out, sums, scales, at_floor, rows, columns, padded,
    SIZE: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, DOUBLE: tl.constexpr,
    STAGES: tl.constexpr, LEVELS: tl.constexpr, MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr,
    NORMALISE: tl.constexpr, RESCALE: tl.constexpr, SIGNED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    PLANES: tl.constexpr, WIDTH: tl.constexpr, FP4: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x `[rows, columns]` from `ROWS * program_id(0)` on, one after the other.

    Writes `out`, in the order of `place` and zeros behind the row: with WIDTH 8 int8 `[rows, padded]` integers
    `MULTIPLIER * code - SHIFT`; with WIDTH 4, 2 or 1 uint8 `[rows, padded * WIDTH / 8]` codes, with FP4 integers as
    e2m1; with PLANES uint8 `[rows, PLANES, padded / 8 * BITS]`. And int32 `sums [rows]` of the integers; fp32
    `scales [rows]`. NORMALISE is rms, absmax, norm or static. WHOLE: SIZE numbers are the row, else it comes in
    pieces. EVEN: pieces have no tail. DOUBLE: see `_squares`. `constants` fp64: 1 / columns, and the inverse root of a
    block; `at_floor`: the normaliser of the least sigma.
    """
    cuts = cuts_of(thresholds, LEVELS, MULTIPLIER, SHIFT)
    one_of_columns, inverse_root = tl.load(constants), tl.load(constants + 1)
    start = tl.program_id(0).to(tl.int64) * ROWS
    piece = tl.arange(0, SIZE)
    # In 64 bits: all rows together may be more than 2^31 numbers.
    to_next = tl.zeros([], tl.int64) + columns
    out_to_next = tl.zeros([], tl.int64) + (padded // 8 * (PLANES * BITS if PLANES else WIDTH))
    for row in range(start, tl.minimum(start + ROWS, rows)):
        begin, target = x + row * to_next, out + row * out_to_next
        x0 = tl.zeros([SIZE], tl.float32)
        # 1. The statistic, of squares in fp64. A comparison would swallow a NaN, so it is looked for.
        squares = tl.zeros([], tl.float64)
        most = tl.zeros([], tl.float32)
        if WHOLE:
            x0 = _values(begin, signs, piece, columns, SIGNED)
            squares += _squares(x0, SIZE, DOUBLE)
            if NORMALISE == "absmax":
                most = tl.max(tl.abs(x0))
        else:
            for first in range(0, columns, SIZE):
                some = _values(begin, signs, first + piece, columns, SIGNED)
                squares += _squares(some, SIZE, DOUBLE)
                if NORMALISE == "absmax":
                    most = tl.maximum(most, tl.max(tl.abs(some)))
        # 2. The normaliser, once rounded; within two units of fp64 of the reference's before that.
        mean = squares * one_of_columns
        finite = mean <= tl.full([], 1e60, tl.float64)
        floor = tl.full([], 1e-8, tl.float64)
        if NORMALISE == "absmax":
            sigma = most.to(tl.float64)
            low = sigma <= floor
            finite = finite & (sigma <= tl.full([], 1e30, tl.float64))
            inverse = inverse_root / tl.maximum(sigma, floor)
        else:
            low = mean <= tl.full([], 1e-16, tl.float64)
            inverse = _inverse_root(tl.where(low, 1.0, mean))
            sigma = mean * inverse
            inverse *= inverse_root
        if NORMALISE == "static":
            r = (tl.load(rstd).to(tl.float64) * inverse_root).to(tl.float32)
        else:
            r = tl.where(low, at_floor, inverse.to(tl.float32))
        r = tl.where(finite, r, float("nan"))
        # 3. Rotation, thresholds, integers.
        total = tl.zeros([], tl.int32)
        levels = tl.zeros([], tl.int64)
        if WHOLE:
            v = butterfly(x0, SIZE, STAGES) * r
            integer = _coded(
                v, 0, cuts, target, columns, padded,
                SIZE, EVEN, LEVELS, MULTIPLIER, SHIFT, BITS, GROUP, PLANES, WIDTH, FP4,
            )  # fmt: skip
            total += tl.sum(integer)
            if NORMALISE == "norm":
                levels += tl.sum((integer * integer).to(tl.int64))
        else:
            for first in range(0, padded, SIZE):
                some = _values(begin, signs, first + piece, columns, SIGNED)
                v = butterfly(some, SIZE, STAGES) * r
                integer = _coded(
                    v, first, cuts, target, columns, padded,
                    SIZE, EVEN, LEVELS, MULTIPLIER, SHIFT, BITS, GROUP, PLANES, WIDTH, FP4,
                )  # fmt: skip
                total += tl.sum(integer)
                if NORMALISE == "norm":
                    levels += tl.sum((integer * integer).to(tl.int64))
        tl.store(sums + row, total)
        # 4. What the row's product is multiplied with; NaN where the row is not finite.
        scale = r - r + 1.0
        if NORMALISE == "norm":
            coded = tl.sqrt(levels.to(tl.float64) / (MULTIPLIER * MULTIPLIER))
            kept = tl.where(coded > 0, tl.sqrt(squares) / coded, 0.0)
            scale = (kept * scale.to(tl.float64)).to(tl.float32)
        elif RESCALE:
            scale = scale * tl.where(low, floor, sigma).to(tl.float32)
        tl.store(scales + row, scale)


@triton.jit
def arrange(
    kept, thresholds, out, sums, columns, padded,
    SIZE: tl.constexpr, LEVELS: tl.constexpr, MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`code_rows` of what is coded already: int8 steps of 1/32, `[rows, columns]`, see `bellbox.ops.kept`."""
    row = tl.program_id(0).to(tl.int64)
    cuts = cuts_of(thresholds, LEVELS, MULTIPLIER, SHIFT)
    total = tl.zeros([], tl.int32)
    for first in range(0, padded, SIZE):
        column = first + tl.arange(0, SIZE)
        inside = column < columns
        step = tl.load(kept + row * columns + column, mask=inside, other=0).to(tl.float32)
        integer = tl.where(inside, reached(step * 0.03125, cuts, LEVELS, MULTIPLIER, SHIFT), 0)
        total += tl.sum(integer)
        store_fields(out + row * padded, first, integer, padded, SIZE, BITS, GROUP, 8)
    tl.store(sums + row, total)
