"""Kernels of rows whose normaliser is given: what training and evaluation of fake-quantized layers run.

Program ids: row, piece of SIZE columns, but for what needs a mean of its row.
"""
# Triton's language looks like Python and is none: `tl.constexpr` is a number, a pointer plus a number a pointer.
# So types are not checked here (`ignore` of pyright in pyproject.toml).

from __future__ import annotations

import triton
import triton.language as tl

from bellbox.ops.backends.triton.kernels.steps import butterfly, cuts_of, reached


@triton.jit
def row_rms(x, out, columns, SIZE: tl.constexpr):
    """fp64 root of the mean square of each row of `[rows, columns]`. Program id: row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([], tl.float64)
    for first in range(0, columns, SIZE):
        column = first + tl.arange(0, SIZE)
        wide = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float64)
        squares += tl.sum(wide * wide)
    tl.store(out + row, tl.sqrt(squares) / tl.sqrt(tl.zeros([], tl.float64) + columns))


@triton.jit
def rotate(x, out, factor, columns, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """`butterfly(x) * factor`."""
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = tl.program_id(0).to(tl.int64) * columns + column
    v = tl.load(x + at, mask=column < columns, other=0.0).to(tl.float32)
    v = butterfly(v, SIZE, STAGES) * factor
    tl.store(out + at, v.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def encode(
    x, r, thresholds, out, columns, r_step, SIZE: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr
):
    """uint8 codes, see `bellbox.ops.encode`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = row * columns + column
    v = tl.load(x + at, mask=column < columns, other=0.0).to(tl.float32)
    v = butterfly(v, SIZE, STAGES) * tl.load(r + row * r_step)
    tl.store(out + at, reached(v, cuts_of(thresholds, LEVELS), LEVELS).to(tl.uint8), mask=column < columns)


@triton.jit
def keep(
    x, r, thresholds, starts, ends, out, columns, r_step,
    SIZE: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """int8 steps of 1/32 that have the code of the value, see `bellbox.ops.kept`.

    `starts`, `ends`: fp32 first and last step of each code.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = row * columns + column
    v = tl.load(x + at, mask=column < columns, other=0.0).to(tl.float32)
    v = butterfly(v, SIZE, STAGES) * tl.load(r + row * r_step)
    code = reached(v, cuts_of(thresholds, LEVELS), LEVELS)
    # Adding 1.5 * 2^23 leaves no bits below one: it rounds to the nearest, ties to even.
    step = tl.minimum(tl.maximum(v * 32.0, -127.0), 127.0)
    step = (step + 12582912.0) - 12582912.0
    step = tl.where(v == v, step, -127.0)
    step = tl.minimum(tl.maximum(step, tl.load(starts + code)), tl.load(ends + code))
    tl.store(out + at, step.to(tl.int8), mask=column < columns)


@triton.jit
def kept_codes(kept, thresholds, out, count, SIZE: tl.constexpr, LEVELS: tl.constexpr):
    """uint8 codes of steps, seen as one row. Program id: piece."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    step = tl.load(kept + at, mask=at < count, other=0).to(tl.float32)
    tl.store(
        out + at, reached(step * 0.03125, cuts_of(thresholds, LEVELS), LEVELS).to(tl.uint8), mask=at < count
    )


@triton.jit
def decode_kept(
    kept, scale, thresholds, out, offset, columns, scale_step, SIZE: tl.constexpr, LEVELS: tl.constexpr
):
    """`(code - offset) * scale`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = row * columns + column
    step = tl.load(kept + at, mask=column < columns, other=0).to(tl.float32)
    level = reached(step * 0.03125, cuts_of(thresholds, LEVELS), LEVELS).to(tl.float32) - offset
    level = level * tl.load(scale + row * scale_step)
    tl.store(out + at, level.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def forward(
    x, r, scale, thresholds, out, value, offset, columns, r_step, scale_step,
    SIZE: tl.constexpr, STAGES: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """`bellbox::bbq_forward`: levels times scale, and the normalised rotated value."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at, inside = row * columns + column, column < columns
    inverse = tl.load(r + row * r_step)
    # NaN where the normaliser is not finite: a comparison would swallow it.
    worth = tl.load(scale + row * scale_step) * (inverse - inverse + 1.0)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    v = butterfly(v, SIZE, STAGES) * inverse
    level = (reached(v, cuts_of(thresholds, LEVELS), LEVELS).to(tl.float32) - offset) * worth
    tl.store(value + at, v.to(value.dtype.element_ty), mask=inside)
    tl.store(out + at, level.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _slope(
    grad, value, levels, thresholds, offset, at, inside, gamma, KEPT: tl.constexpr, LEVELS: tl.constexpr
):
    """Gradient to the value, the value, and gradient times level, of some numbers of a row."""
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if KEPT:
        v = tl.load(value + at, mask=inside, other=0).to(tl.float32) * 0.03125
        level = reached(v, cuts_of(thresholds, LEVELS), LEVELS).to(tl.float32) - offset
    else:
        v = tl.load(value + at, mask=inside, other=0.0).to(tl.float32)
        level = tl.load(levels + at, mask=inside, other=0.0).to(tl.float32)
    # g_v = 2 gamma phi(v) G: the box is n Phi(v) and a level is gamma / (n/2), so n cancels.
    soft = tl.exp(v * v * -0.5) * (gamma * 0.7978845608028654) * g
    return soft, v, level * g


@triton.jit
def backward(
    grad, value, levels, thresholds, r, gamma, free, out, dots, offset, columns, r_step, gamma_step, free_step,
    SIZE: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr, KEPT: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """`bellbox::bbq_backward` with sigma of each row, or with KEPT `bellbox::bbq_backward_kept`. Program id: row.

    WHOLE: SIZE numbers are the row, else it comes in pieces, twice.
    """
    row = tl.program_id(0).to(tl.int64)
    worth = tl.load(gamma + row * gamma_step)
    inverse = tl.load(r + row * r_step)
    along = tl.zeros([], tl.float32)
    dot = tl.zeros([], tl.float32)
    piece = tl.arange(0, SIZE)
    soft = tl.zeros([SIZE], tl.float32)
    v = soft
    if WHOLE:
        inside = piece < columns
        soft, v, product = _slope(
            grad, value, levels, thresholds, offset, row * columns + piece, inside, worth, KEPT, LEVELS
        )
        along += tl.sum(soft * v)
        dot += tl.sum(product)
    else:
        for first in range(0, columns, SIZE):
            at = row * columns + first + piece
            inside = first + piece < columns
            some, part, product = _slope(
                grad, value, levels, thresholds, offset, at, inside, worth, KEPT, LEVELS
            )
            along += tl.sum(some * part)
            dot += tl.sum(product)
    tl.store(dots + row, dot)
    mean = along / columns * tl.load(free + row * free_step)
    if WHOLE:
        g = butterfly((soft - v * mean) * inverse, SIZE, STAGES)
        tl.store(out + row * columns + piece, g.to(out.dtype.element_ty), mask=piece < columns)
    else:
        for first in range(0, columns, SIZE):
            at = row * columns + first + piece
            inside = first + piece < columns
            some, part, _ = _slope(grad, value, levels, thresholds, offset, at, inside, worth, KEPT, LEVELS)
            g = butterfly((some - part * mean) * inverse, SIZE, STAGES)
            tl.store(out + at, g.to(out.dtype.element_ty), mask=inside)
