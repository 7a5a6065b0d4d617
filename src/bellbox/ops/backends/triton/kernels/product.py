"""Products of coded rows with packed weights: int8 tensor cores, or bit planes; and the epilogue.

Weights are read as they are stored (`bellbox.ops.weight_layout`) and unpacked in registers. They are the left operand:
tensor cores take that one from registers. Every sum is an integer, so splitting it changes no bit.
"""
# Triton's language looks like Python and is none: `tl.constexpr` is a number, a pointer plus a number a pointer.
# So types are not checked here (`ignore` of pyright in pyproject.toml).

from __future__ import annotations

import triton
import triton.language as tl

from bellbox.ops.backends.triton.kernels.steps import tile_at


@triton.jit
def scaled(total, weight_scale, act_scale, row_scale, bias, BIAS: tl.constexpr):
    """Separate fp32 roundings in the order of `bellbox.ops.integer.scaled_product`; not one fused multiply-add."""
    y = total.to(tl.float32) * (weight_scale * act_scale) * row_scale
    if BIAS:
        y = y + bias
    return y


@triton.jit
def _unpacked(words, high, field, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, BITS: tl.constexpr):
    """int8 codes `[OUTPUTS, DEPTH]` of one field of each byte, four at once; of three bits the third stands apart."""
    if BITS == 3:
        code = ((words >> (2 * field)) & 0x03030303) | (((high >> (2 * field)) & 0x01010101) << 2)
    else:
        code = (words >> (BITS * field)) & (0x01010101 * ((1 << BITS) - 1))
    return four_bytes(code, OUTPUTS, DEPTH)


@triton.jit
def tile_of(
    weight, first, outputs, blocks,
    OUTPUTS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Where the words of OUTPUTS outputs and GROUP blocks stand, `[OUTPUTS / 16, GROUP, VECTORS, 16]`.

    A word is four columns of an output, and 16 outputs stand together: sums of ranges tell the compiler so.
    """
    strip = (first + tl.arange(0, OUTPUTS // 16)).to(tl.int64)[:, None, None, None] * (blocks * WORDS)
    block = tl.arange(0, GROUP)[None, :, None, None] * WORDS
    vector = tl.arange(0, VECTORS)[None, None, :, None] * 16
    return weight + strip + (block + vector + tl.arange(0, 16)[None, None, None, :])


@triton.jit
def words_of(
    tile, step, left, first, outputs,
    OUTPUTS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """int32 `[OUTPUTS, GROUP * VECTORS]` at one step along the columns, with `left` blocks to come."""
    there = (first + tl.arange(0, OUTPUTS // 16) < tl.cdiv(outputs, 16))[:, None, None, None]
    there = there & (tl.arange(0, GROUP) < left)[None, :, None, None]
    words = tl.load(tile + step * (GROUP * WORDS), mask=there, other=0)
    return tl.reshape(tl.permute(words, 0, 3, 1, 2), [OUTPUTS, GROUP * VECTORS])


@triton.jit
def four_bytes(words, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """int8 `[OUTPUTS, DEPTH]` of the bytes of words, the lowest first."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [OUTPUTS, DEPTH])


@triton.jit
def _integers(
    words, field, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
    MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """int8 `[DEPTH, ROWS]` of one field of the bytes of coded rows `[ROWS, DEPTH / 4]`, four at once.

    A shift is 0 to 127, so no byte borrows from the next one.
    """
    code = (words >> (WIDTH * field)) & (0x01010101 * ((1 << WIDTH) - 1))
    integer = ((code * MULTIPLIER | ~0x7F7F7F7F) - 0x01010101 * SHIFT) ^ ~0x7F7F7F7F
    return tl.trans(four_bytes(integer, ROWS, DEPTH))


@triton.jit
def multiply(
    act, weight, sums, row_scale, weight_scale, act_scale, bias, out, rows, outputs, blocks, padded, row_step,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SPLITS: tl.constexpr,
    BAND: tl.constexpr, WIDTH: tl.constexpr, MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr,
    ACT_MULTIPLIER: tl.constexpr, ACT_SHIFT: tl.constexpr, WEIGHT_WORTH: tl.constexpr, ACT_WORTH: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Tile of ROWS x OUTPUTS of act `[rows, padded]` int8 times the weights, `[outputs, 64 blocks]`, read as int32.

    With WIDTH 4, 2 or 1 act is int32 words of `[rows, padded * WIDTH / 8]` bytes of codes, whose integers are
    `ACT_MULTIPLIER * code - ACT_SHIFT`.

    Program ids: tile, piece of the columns. `out` is `[rows, outputs]`, or with SPLITS above 1 the pieces' int32 sums,
    `[SPLITS, rows, outputs]`. A weight's integer is `MULTIPLIER * code - SHIFT`.
    """
    FIELD: tl.constexpr = 2 if BITS == 3 else BITS
    SPAN: tl.constexpr = 8 * FIELD
    FIELDS: tl.constexpr = 8 // FIELD
    DEPTH: tl.constexpr = GROUP * SPAN
    WORDS: tl.constexpr = 32 * BITS
    piece = tl.program_id(1)
    tile_m, tile_n = tile_at(tl.program_id(0), rows, outputs, ROWS, OUTPUTS, BAND)
    n = tile_n * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tile_m * ROWS + tl.arange(0, ROWS)
    first = tile_n * (OUTPUTS // 16)
    low = tile_of(weight, first, outputs, blocks, OUTPUTS, GROUP, WORDS, 2 * FIELD)
    high = low
    if BITS == 3:
        high = tile_of(weight + 64, first, outputs, blocks, OUTPUTS, GROUP, WORDS, 2)
    SHARED: tl.constexpr = 8 // WIDTH
    real = (m < rows)[None, :]
    if SHARED == 1:
        columns = act + m.to(tl.int64)[None, :] * padded + tl.arange(0, DEPTH)[:, None]
    else:
        columns = act + m.to(tl.int64)[:, None] * (padded // (4 * SHARED)) + tl.arange(0, DEPTH // 4)[None, :]

    steps = tl.cdiv(blocks, GROUP)
    each = tl.cdiv(steps, SPLITS)
    total = tl.zeros([OUTPUTS, ROWS], tl.int32)
    for step in range(piece * each, tl.minimum((piece + 1) * each, steps)):
        left = blocks - step * GROUP
        words = words_of(low, step, left, first, outputs, OUTPUTS, GROUP, WORDS, 2 * FIELD)
        thirds = words
        if BITS == 3:
            thirds = words_of(high, step, left, first, outputs, OUTPUTS, GROUP, WORDS, 2)
            # Bit `2 * field + part` of the two words of a block belongs to columns 8 part to 8 part + 8 of a field.
            thirds = tl.reshape(thirds, [OUTPUTS, GROUP, 1, 2]) >> tl.arange(0, 2)[None, None, :, None]
            thirds = tl.reshape(thirds, [OUTPUTS, GROUP * 4])
        for field in tl.static_range(0, FIELDS):
            codes = _unpacked(words, thirds, field, OUTPUTS, DEPTH, BITS)
            if SHARED == 1:
                given = tl.load(columns + step * (64 * GROUP) + field * DEPTH, mask=real, other=0)
            else:
                part = step * (16 * GROUP // SHARED) + field // SHARED * (DEPTH // 4)
                held = tl.load(columns + part, mask=(m < rows)[:, None], other=0)
                given = _integers(held, field % SHARED, ROWS, DEPTH, WIDTH, ACT_MULTIPLIER, ACT_SHIFT)
            total = tl.dot(codes, given, total, out_dtype=tl.int32)

    mask = (n < outputs)[:, None] & real
    if SPLITS > 1:
        at = (piece.to(tl.int64) * rows + m.to(tl.int64)[None, :]) * outputs + n[:, None]
        tl.store(out + at, total, mask=mask)
    else:
        sum_of_row = tl.load(sums + m, mask=m < rows, other=0)[None, :]
        y = scaled(
            total * MULTIPLIER - SHIFT * sum_of_row,
            (tl.load(weight_scale + n, mask=n < outputs, other=0.0) * WEIGHT_WORTH)[:, None],
            tl.load(act_scale) * ACT_WORTH,
            tl.load(row_scale + m * row_step, mask=m < rows, other=0.0)[None, :],
            tl.load(bias + n, mask=n < outputs, other=0.0)[:, None] if BIAS else 0.0,
            BIAS,
        )
        at = m.to(tl.int64)[:, None] * outputs + n[None, :]
        tl.store(out + at, tl.trans(y).to(out.dtype.element_ty), mask=tl.trans(mask))


@triton.jit
def finish(
    partial, sums, row_scale, weight_scale, act_scale, bias, out, rows, outputs, row_step,
    SIZE: tl.constexpr, SPLITS: tl.constexpr, MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr,
    WEIGHT_WORTH: tl.constexpr, ACT_WORTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Adds up what `multiply` left of its pieces, and scales. Program ids: row, SIZE outputs."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = n < outputs
    total = tl.zeros([SIZE], tl.int32)
    for piece in tl.static_range(0, SPLITS):
        total += tl.load(partial + (piece * rows + row) * outputs + n, mask=inside, other=0)
    y = scaled(
        total * MULTIPLIER - SHIFT * tl.load(sums + row),
        tl.load(weight_scale + n, mask=inside, other=0.0) * WEIGHT_WORTH,
        tl.load(act_scale) * ACT_WORTH,
        tl.load(row_scale + row * row_step),
        tl.load(bias + n, mask=inside, other=0.0) if BIAS else 0.0,
        BIAS,
    )
    tl.store(out + row * outputs + n, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bits_set(x):
    # The form that compilers know as a population count.
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def multiply_planes(
    act, weight, weight_sums, sums, row_scale, weight_scale, act_scale, bias, out, rows, outputs, blocks, row_step,
    BITS: tl.constexpr, PLANES: tl.constexpr, OUTPUTS: tl.constexpr, WORDS: tl.constexpr,
    MULTIPLIER: tl.constexpr, SHIFT: tl.constexpr, ACT_MULTIPLIER: tl.constexpr, ACT_SHIFT: tl.constexpr,
    WEIGHT_WORTH: tl.constexpr, ACT_WORTH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One row times weights of 1 or 2 bits, bit by bit: `and`, and a count of what is left.

    Program ids: row, OUTPUTS outputs. act int32 `[rows, PLANES, words]`; weights are read as int32 words. With codes c
    the product of integers `M c - s` is `M M' sum(c c') - M s' sum(c) - s sum(M' c' - s')`.
    """
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    word = tl.arange(0, WORDS)
    VECTORS: tl.constexpr = 2 * BITS
    words = blocks * VECTORS
    # Word j of a block of 64 columns holds, for each of 16 rows, four bytes.
    strip = weight + (n // 16).to(tl.int64) * (words * 16) + n % 16
    there = ((n // 16) * 16 < outputs)[:, None]
    count = tl.zeros([OUTPUTS, WORDS], tl.int32)
    for first in range(0, words, WORDS):
        inside = first + word < words
        held = tl.load(
            strip[:, None] + (first + word)[None, :] * 16, mask=there & inside[None, :], other=0
        ).to(tl.uint32, bitcast=True)
        for plane in tl.static_range(0, PLANES):
            given = tl.load(act + (row * PLANES + plane) * words + first + word, mask=inside, other=0)
            given = given.to(tl.uint32, bitcast=True)[None, :]
            for bit in tl.static_range(0, BITS):
                count += _bits_set((held >> bit) & given) << (plane + bit)
    total = tl.sum(count, 1)
    inside = n < outputs
    total = (
        total * (MULTIPLIER * ACT_MULTIPLIER)
        - tl.load(weight_sums + n, mask=inside, other=0) * (MULTIPLIER * ACT_SHIFT)
        - SHIFT * tl.load(sums + row)
    )
    y = scaled(
        total,
        tl.load(weight_scale + n, mask=inside, other=0.0) * WEIGHT_WORTH,
        tl.load(act_scale) * ACT_WORTH,
        tl.load(row_scale + row * row_step),
        tl.load(bias + n, mask=inside, other=0.0) if BIAS else 0.0,
        BIAS,
    )
    tl.store(out + row * outputs + n, y.to(out.dtype.element_ty), mask=inside)
