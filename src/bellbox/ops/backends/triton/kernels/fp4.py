"""Products on the FP4 tensor cores of Blackwell: weights of 1 to 3 bits, inputs whose integers reach 4 at most.

e2m1 holds 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, so such codes are exact in it, and so are fp32 sums of their
products. All block scales are one. Compiled, and proven in the interpreter with `EMULATED`; not seen on a GPU yet.
"""
# Triton's language looks like Python and is none: `tl.constexpr` is a number, a pointer plus a number a pointer.
# So types are not checked here (`ignore` of pyright in pyproject.toml).

from __future__ import annotations

import triton
import triton.language as tl

from bellbox.ops.backends.triton.kernels.product import four_bytes, scaled, tile_of, words_of
from bellbox.ops.backends.triton.kernels.steps import tile_at


@triton.jit
def e2m1(integer):
    """The four bits of integers of -4 to 4."""
    size = tl.abs(integer)
    return tl.where(size <= 1, 2 * size, size + 2) + tl.where(integer < 0, 8, 0)


@triton.jit
def _e2m1_of(words, high, pair, BITS: tl.constexpr):
    """Words of fields `2 * pair` and the next as e2m1: codes of 1 and 2 bits, codes less 4 of 3 bits."""
    if BITS == 1:
        two = words >> (2 * pair)
        found = ((two & 0x01010101) | ((two & 0x02020202) << 3)) << 1
    else:
        two = words >> (4 * pair)
        code = (two & 0x03030303) | ((two & 0x0C0C0C0C) << 2)
        three = code & (code >> 1) & 0x11111111
        found = (code << 1) - three  # 0, 1, 2, 3 are 0, 2, 4, 5
        if BITS == 3:
            third = ((high >> (4 * pair)) & 0x01010101) | (((high >> (4 * pair + 2)) & 0x01010101) << 4)
            less = (0x6E6E6E6E - code) - three  # -4, -3, -2, -1 are 14, 13, 12, 10; but for the uppermost bit
            less = (less & 0x77777777) | ~0x77777777
            mask = third * 15
            found = (found & mask) | (less & ~mask)
    return found


@triton.jit
def _value(nibble):
    size = (nibble & 7).to(tl.float32)
    size = tl.where(size < 4, size * 0.5, tl.where(size < 7, size - 2, 6.0))
    return tl.where((nibble & 8) > 0, -size, size)


@triton.jit
def multiply_fp4(
    act, weight, sums, row_scale, weight_scale, act_scale, bias, out, rows, outputs, blocks, padded, row_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BAND: tl.constexpr,
    MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr, WEIGHT_WORTH: tl.constexpr, ACT_WORTH: tl.constexpr,
    BIAS: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    """As `product.multiply`, without pieces: act `[rows, padded / 2]` e2m1, weights int32 words of 1 to 3 bits."""
    FIELD: tl.constexpr = 2 if BITS == 3 else BITS
    PAIRS: tl.constexpr = 4 // FIELD
    DEPTH: tl.constexpr = GROUP * 8 * FIELD
    WORDS: tl.constexpr = 32 * BITS
    tile_m, tile_n = tile_at(tl.program_id(0), rows, outputs, ROWS, OUTPUTS, BAND)
    n = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tile_m * ROWS + tl.arange(0, ROWS)
    first = tile_n * (OUTPUTS // 16)
    low = tile_of(weight, first, outputs, blocks, OUTPUTS, GROUP, WORDS, 2 * FIELD)
    high = low
    if BITS == 3:
        high = tile_of(weight + 64, first, outputs, blocks, OUTPUTS, GROUP, WORDS, 2)
    columns = act + m.to(tl.int64)[None, :] * (padded // 2) + tl.arange(0, DEPTH)[:, None]
    real = (m < rows)[None, :]
    one_n = tl.full([OUTPUTS, 2 * DEPTH // 32], 127, tl.uint8)
    one_m = tl.full([ROWS, 2 * DEPTH // 32], 127, tl.uint8)

    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for step in range(0, tl.cdiv(blocks, GROUP)):
        left = blocks - step * GROUP
        words = words_of(low, step, left, first, outputs, OUTPUTS, GROUP, WORDS, 2 * FIELD)
        thirds = words
        if BITS == 3:
            thirds = words_of(high, step, left, first, outputs, OUTPUTS, GROUP, WORDS, 2)
            thirds = tl.reshape(thirds, [OUTPUTS, GROUP, 1, 2]) >> tl.arange(0, 2)[None, None, :, None]
            thirds = tl.reshape(thirds, [OUTPUTS, GROUP * 4])
        for pair in tl.static_range(0, PAIRS):
            codes = four_bytes(_e2m1_of(words, thirds, pair, BITS), OUTPUTS, DEPTH).to(tl.uint8, bitcast=True)
            given = tl.load(columns + step * (32 * GROUP) + pair * DEPTH, mask=real, other=0)
            if EMULATED:
                total = tl.dot(_value(codes & 15), _value(given & 15), total)
                total = tl.dot(_value(codes >> 4), _value(given >> 4), total)
            else:
                total = tl.dot_scaled(codes, one_n, "e2m1", given, one_m, "e2m1", total)

    # What was taken from codes of three bits is given back with the sums of the rows.
    TAKEN: tl.constexpr = 4 if BITS == 3 else 0
    mask = (n < outputs)[:, None] & real
    sum_of_row = tl.load(sums + m, mask=m < rows, other=0)[None, :]
    y = scaled(
        total.to(tl.int32) * MULTIPLIER - (SHIFT - TAKEN * MULTIPLIER) * sum_of_row,
        (tl.load(weight_scale + n, mask=n < outputs, other=0.0) * WEIGHT_WORTH)[:, None],
        tl.load(act_scale) * ACT_WORTH,
        tl.load(row_scale + m * row_step, mask=m < rows, other=0.0)[None, :],
        tl.load(bias + n, mask=n < outputs, other=0.0)[:, None] if BIAS else 0.0,
        BIAS,
    )
    at = m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out + at, tl.trans(y).to(out.dtype.element_ty), mask=tl.trans(mask))
