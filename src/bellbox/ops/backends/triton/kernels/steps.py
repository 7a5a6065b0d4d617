"""What kernels of rows are made of: the rotation in registers, the search among thresholds, places of codes.

Sizes in capitals are known when a kernel is compiled.
"""
# Triton's language looks like Python and is none: `tl.constexpr` is a number, a pointer plus a number a pointer.
# So types are not checked here (`ignore` of pyright in pyproject.toml).

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def butterfly(x, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """Each run of 2^STAGES of `SIZE` fp32 numbers, rotated by the additions of `bellbox.core.hadamard` in their order.

    A number's partner is found without a shared memory: the sum of both as integers, less the number itself. It wraps
    around and is exact, and is a register or a shuffle where adding floats by reshaping would go by way of memory.
    """
    for stage in tl.static_range(0, STAGES):
        pairs = tl.reshape(x, [SIZE >> (stage + 1), 2, 1 << stage])
        bits = pairs.to(tl.int32, bitcast=True)
        partner = (tl.sum(bits, 1, keep_dims=True) - bits).to(tl.float32, bitcast=True)
        first = tl.arange(0, 2)[None, :, None] == 0
        x = tl.reshape(tl.where(first, pairs + partner, partner - pairs), [SIZE])
    return x


@triton.jit
def _reached1(v, t0):
    return (v >= t0).to(tl.int32)


@triton.jit
def _reached2(v, t0, t1, t2):
    up = v >= t1
    return 2 * up.to(tl.int32) + _reached1(v, tl.where(up, t2, t0))


@triton.jit
def _reached3(v, t0, t1, t2, t3, t4, t5, t6):
    up = v >= t3
    return 4 * up.to(tl.int32) + _reached2(
        v, tl.where(up, t4, t0), tl.where(up, t5, t1), tl.where(up, t6, t2)
    )


@triton.jit
def _threshold(table, INDEX: tl.constexpr, LEVELS: tl.constexpr):
    # Beyond the last one stands NaN, which nothing reaches.
    if INDEX < LEVELS - 1:  # noqa: SIM108 (both sides would be evaluated)
        t = tl.load(table + INDEX)
    else:
        t = float("nan")
    return t


@triton.jit
def reached(v, table, LEVELS: tl.constexpr):
    """int32 number of the LEVELS - 1 rising thresholds in `table` that `v` reaches; none for NaN.

    A search by halves: four comparisons and eleven selections for 16 levels, not fifteen comparisons and additions.
    """
    t0 = _threshold(table, 0, LEVELS)
    if LEVELS <= 2:
        code = _reached1(v, t0)
    else:
        t1 = _threshold(table, 1, LEVELS)
        t2 = _threshold(table, 2, LEVELS)
        if LEVELS <= 4:
            code = _reached2(v, t0, t1, t2)
        else:
            t3 = _threshold(table, 3, LEVELS)
            t4 = _threshold(table, 4, LEVELS)
            t5 = _threshold(table, 5, LEVELS)
            t6 = _threshold(table, 6, LEVELS)
            if LEVELS <= 8:
                code = _reached3(v, t0, t1, t2, t3, t4, t5, t6)
            else:
                up = v >= _threshold(table, 7, LEVELS)
                code = 8 * up.to(tl.int32) + _reached3(
                    v,
                    tl.where(up, _threshold(table, 8, LEVELS), t0),
                    tl.where(up, _threshold(table, 9, LEVELS), t1),
                    tl.where(up, _threshold(table, 10, LEVELS), t2),
                    tl.where(up, _threshold(table, 11, LEVELS), t3),
                    tl.where(up, _threshold(table, 12, LEVELS), t4),
                    tl.where(up, _threshold(table, 13, LEVELS), t5),
                    tl.where(up, _threshold(table, 14, LEVELS), t6),
                )
    return code


@triton.jit
def place(column, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Where a column's integer stands in a row that a product reads: field by field, as GROUP blocks of weights come.

    Field f of byte i of a block of 64 columns is column `f * 8 BITS + i` (`bellbox.ops.weight_layout`).
    """
    SPAN: tl.constexpr = 8 * BITS
    inside = column % 64
    block = (column // 64) % GROUP
    return (
        column // (64 * GROUP) * (64 * GROUP) + inside // SPAN * (GROUP * SPAN) + block * SPAN + inside % SPAN
    )


@triton.jit
def planes(code, row, first, out, words, SIZE: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr):
    """Bits of `SIZE` codes from column `first` on, one plane after the other, into words that meet the weights'.

    `out` uint8 `[rows, PLANES, 4 * words]`: bit `f * BITS` of byte i of a block is the plane's bit of column
    `f * 8 BITS + i`.
    """
    SPAN: tl.constexpr = 8 * BITS
    FIELDS: tl.constexpr = 8 // BITS
    fields = tl.reshape(code, [SIZE // 64, FIELDS, SPAN])
    shift = tl.arange(0, FIELDS)[None, :, None] * BITS
    at = first // 64 * SPAN + tl.arange(0, SIZE // 64 * SPAN)
    for plane in tl.static_range(0, PLANES):
        byte = tl.sum(((fields >> plane) & 1) << shift, 1)
        begin = out + (row * PLANES + plane) * (4 * words)
        tl.store(begin + at, tl.reshape(byte, [SIZE // 64 * SPAN]).to(tl.uint8), mask=at < 4 * words)
