"""Rows of floats to integers in one launch: statistic, rotation, thresholds, codes and the row's scale.

A program holds a row in registers, or passes over a long one twice.
"""
# Triton's language looks like Python and is none: `tl.constexpr` is a number, a pointer plus a number a pointer.
# So types are not checked here (`ignore` of pyright in pyproject.toml).

from __future__ import annotations

import triton
import triton.language as tl

from bellbox.ops.backends.triton.kernels.steps import butterfly, place, planes, reached


@triton.jit
def _values(x, signs, row, column, columns, SIGNED: tl.constexpr):
    inside = column < columns
    v = tl.load(x + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    if SIGNED:
        v = v * tl.load(signs + column, mask=inside, other=1).to(tl.float32)
    return v


@triton.jit
def code_rows(
    x, signs, thresholds, rstd, out, sums, scales, columns, padded,
    SIZE: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr, MULTIPLIER: tl.constexpr,
    SHIFT: tl.constexpr, NORMALISE: tl.constexpr, RESCALE: tl.constexpr, SIGNED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Row `program_id(0)` of x `[rows, columns]`.

    Writes `out`, int8 `[rows, padded]` integers `MULTIPLIER * code - SHIFT` in the order of `place` and zeros behind
    them, or with PLANES uint8 `[rows, PLANES, padded / 8 * BITS]`; int32 `sums [rows]` of the integers; fp32
    `scales [rows]`. NORMALISE is rms, absmax, norm or static. WHOLE: SIZE numbers are the row, else it comes in pieces.
    """
    row = tl.program_id(0).to(tl.int64)
    piece = tl.arange(0, SIZE)
    x0 = tl.zeros([SIZE], tl.float32)
    # 1. The statistic, of squares in fp64. A comparison would swallow a NaN, so it is looked for.
    squares = tl.zeros([], tl.float64)
    most = tl.zeros([], tl.float32)
    if WHOLE:
        x0 = _values(x, signs, row, piece, columns, SIGNED)
        wide = x0.to(tl.float64)
        squares += tl.sum(wide * wide)
        if NORMALISE == "absmax":
            most = tl.max(tl.abs(x0))
    else:
        for first in range(0, columns, SIZE):
            given = _values(x, signs, row, first + piece, columns, SIGNED)
            wide = given.to(tl.float64)
            squares += tl.sum(wide * wide)
            if NORMALISE == "absmax":
                most = tl.maximum(most, tl.max(tl.abs(given)))
    length = tl.sqrt(squares)
    sigma = length / tl.sqrt(tl.zeros([], tl.float64) + columns)
    finite = sigma <= 1e30
    if NORMALISE == "absmax":
        sigma = most.to(tl.float64)
        finite = (sigma <= 1e30) & (squares == squares)
    floored = tl.maximum(sigma, tl.full([], 1e-8, tl.float64))
    # 2. The normaliser: divisions in fp64, one rounding.
    if NORMALISE == "static":  # noqa: SIM108 (decided when compiling: there may be no rstd)
        inverse = tl.load(rstd).to(tl.float64)
    else:
        inverse = tl.full([], 1.0, tl.float64) / floored
    root = tl.sqrt(tl.full([], 1 << STAGES, tl.float64))
    r = tl.where(finite, inverse / root, float("nan")).to(tl.float32)
    # 3. Rotation, thresholds, integers.
    total = tl.zeros([], tl.int32)
    levels = tl.zeros([], tl.int64)
    if WHOLE:
        code = reached(butterfly(x0, SIZE, STAGES) * r, thresholds, LEVELS)
        inside = piece < columns
        integer = tl.where(inside, MULTIPLIER * code - SHIFT, 0)
        total += tl.sum(integer)
        if NORMALISE == "norm":
            levels += tl.sum((integer * integer).to(tl.int64))
        if PLANES:
            planes(tl.where(inside, code, 0), row, 0, out, padded // 32 * BITS, SIZE, BITS, PLANES)
        else:
            tl.store(out + row * padded + place(piece, BITS, GROUP), integer.to(tl.int8), mask=piece < padded)
    else:
        for first in range(0, padded, SIZE):
            column = first + piece
            inside = column < columns
            v = butterfly(_values(x, signs, row, column, columns, SIGNED), SIZE, STAGES) * r
            code = reached(v, thresholds, LEVELS)
            integer = tl.where(inside, MULTIPLIER * code - SHIFT, 0)
            total += tl.sum(integer)
            if NORMALISE == "norm":
                levels += tl.sum((integer * integer).to(tl.int64))
            if PLANES:
                planes(tl.where(inside, code, 0), row, first, out, padded // 32 * BITS, SIZE, BITS, PLANES)
            else:
                at = out + row * padded + place(column, BITS, GROUP)
                tl.store(at, integer.to(tl.int8), mask=column < padded)
    tl.store(sums + row, total)
    # 4. What the row's product is multiplied with; NaN where the row is not finite.
    scale = r - r + 1.0
    if NORMALISE == "norm":
        coded = tl.sqrt(levels.to(tl.float64) / (MULTIPLIER * MULTIPLIER))
        kept = tl.where(coded > 0, length / coded, 0.0)
        scale = (kept * scale.to(tl.float64)).to(tl.float32)
    elif RESCALE:
        scale = scale * floored.to(tl.float32)
    tl.store(scales + row, scale)


@triton.jit
def arrange(
    kept, thresholds, out, sums, columns, padded,
    SIZE: tl.constexpr, LEVELS: tl.constexpr, MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """`code_rows` of what is coded already: int8 steps of 1/32, `[rows, columns]`, see `bellbox.ops.kept`."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([], tl.int32)
    for first in range(0, padded, SIZE):
        column = first + tl.arange(0, SIZE)
        inside = column < columns
        step = tl.load(kept + row * columns + column, mask=inside, other=0).to(tl.float32)
        integer = tl.where(inside, MULTIPLIER * reached(step * 0.03125, thresholds, LEVELS) - SHIFT, 0)
        total += tl.sum(integer)
        at = out + row * padded + place(column, BITS, GROUP)
        tl.store(at, integer.to(tl.int8), mask=column < padded)
    tl.store(sums + row, total)
