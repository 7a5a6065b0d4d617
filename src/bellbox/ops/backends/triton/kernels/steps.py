"""What kernels are made of: the rotation in registers, the search among thresholds, places of codes and of tiles.

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
        sign = 1.0 - 2.0 * tl.arange(0, 2)[None, :, None].to(tl.float32)
        x = tl.reshape(tl.fma(pairs, sign, partner), [SIZE])
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


BUCKETS = tl.constexpr(32)


@triton.jit
def _bucket(v, scale, offset):
    """Number of the bucket that a value is in: never falling in `v`; the first for NaN."""
    # 2^23 and more have no bits below one: the addition rounds, and the last bits are the number.
    z = tl.minimum(tl.maximum(tl.fma(v, scale, offset), 8388608.0), 8388608.0 + (BUCKETS - 1))
    return z.to(tl.int32, bitcast=True) & (BUCKETS - 1)


@triton.jit
def cuts_of(table, LEVELS: tl.constexpr, MULTIPLIER: tl.constexpr = 1, SHIFT: tl.constexpr = 0):
    """What `reached` needs of the LEVELS - 1 rising thresholds in `table`; made once in a program.

    Up to 8 levels the thresholds, NaN behind the last, which nothing reaches. Above: thresholds in a row; for each of
    32 buckets of equal width the integer of the least code in it, and the threshold that ends this code; the line that
    finds a bucket; and the most thresholds of a bucket.
    """
    none = float("nan")
    if LEVELS <= 2:
        cuts = (tl.load(table),)
    elif LEVELS <= 4:
        cuts = (tl.load(table), tl.load(table + 1), tl.load(table + 2) if LEVELS > 3 else none)
    elif LEVELS <= 8:
        cuts = (
            tl.load(table), tl.load(table + 1), tl.load(table + 2), tl.load(table + 3),
            tl.load(table + 4) if LEVELS > 5 else none,
            tl.load(table + 5) if LEVELS > 6 else none,
            tl.load(table + 6) if LEVELS > 7 else none,
        )  # fmt: skip
    else:
        place = tl.arange(0, 16)
        real = place < LEVELS - 1
        t = tl.load(table + place, mask=real, other=none)
        lowest = tl.load(table)
        scale = (BUCKETS - 3) / (tl.load(table + LEVELS - 2) - lowest)
        offset = 8388609.0 - lowest * scale
        own = tl.where(real, _bucket(t, scale, offset), BUCKETS)[None, :]
        bucket = tl.arange(0, BUCKETS)[:, None]
        before = tl.sum((own < bucket).to(tl.int32), 1)
        most = tl.max(tl.sum((own == bucket).to(tl.int32), 1))
        bits = t.to(tl.uint32, bitcast=True).to(tl.int64)[None, :]
        next = tl.sum(tl.where(before[:, None] == place[None, :], bits, 0), 1)
        integer = (MULTIPLIER * before - SHIFT).to(tl.int64)
        cuts = (t, (integer << 32) | next, scale, offset, most)
    return cuts


@triton.jit
def reached(v, cuts, LEVELS: tl.constexpr, MULTIPLIER: tl.constexpr = 1, SHIFT: tl.constexpr = 0):
    """int32 `MULTIPLIER * code - SHIFT`, the code being the number of thresholds that `v` reaches, none for NaN.

    `cuts` as `cuts_of` makes them, with the same numbers. Up to 8 levels a search by halves. Above, the bucket leaves
    one comparison, for any thresholds that rise: those in lower buckets are reached, those in higher ones are not. A
    bucket of several is walked through.
    """
    if LEVELS > 8:
        found = tl.gather(cuts[1], _bucket(v, cuts[2], cuts[3]), 0)
        integer = (found >> 32).to(tl.int32)
        cut = found.to(tl.int32).to(tl.float32, bitcast=True)
        integer = tl.where(v >= cut, integer + MULTIPLIER, integer)
        for _ in range(1, cuts[4]):
            cut = tl.gather(cuts[0], (integer + SHIFT) // MULTIPLIER, 0)
            integer = tl.where(v >= cut, integer + MULTIPLIER, integer)
    else:
        if LEVELS <= 2:
            code = _reached1(v, cuts[0])
        elif LEVELS <= 4:
            code = _reached2(v, cuts[0], cuts[1], cuts[2])
        else:
            code = _reached3(v, cuts[0], cuts[1], cuts[2], cuts[3], cuts[4], cuts[5], cuts[6])
        integer = MULTIPLIER * code - SHIFT
    return integer


@triton.jit
def store_fields(
    out,
    first,
    value,
    padded,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`SIZE` numbers of WIDTH bits (1, 2, 4 or 8) from column `first` on, each at its `place` in the row `out`.

    `8 / WIDTH` fields share a byte, the first one lowest; BITS is at most WIDTH. A row has `padded * WIDTH / 8` bytes.
    """
    SPAN: tl.constexpr = 8 * BITS
    SHARED: tl.constexpr = 8 // WIDTH
    PARTS: tl.constexpr = WIDTH // BITS
    # Written as sums of ranges: the compiler sees that SPAN numbers stand together, and stores them as one.
    group = tl.arange(0, SIZE // (64 * GROUP))[:, None, None, None] * (64 * GROUP // SHARED)
    block = tl.arange(0, GROUP)[None, :, None, None] * SPAN
    part = tl.arange(0, PARTS)[None, None, :, None] * (GROUP * SPAN)
    at = first // SHARED + group + part + block + tl.arange(0, SPAN)[None, None, None, :]
    if SHARED > 1:
        fields = tl.reshape(value, [SIZE // (64 * GROUP), GROUP, PARTS, SHARED, SPAN])
        given = tl.sum(fields << (WIDTH * tl.arange(0, SHARED))[None, None, None, :, None], 3)
    else:
        # Bytes before they move: a quarter of what passes between threads.
        given = tl.reshape(value.to(tl.int8), [SIZE // (64 * GROUP), GROUP, PARTS, SPAN])
    tl.store(out + at, given.to(out.dtype.element_ty), mask=at < padded // SHARED)


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
def planes(code, first, out, words, SIZE: tl.constexpr, BITS: tl.constexpr, PLANES: tl.constexpr):
    """Bits of `SIZE` codes from column `first` on, one plane after the other, into words that meet the weights'.

    `out` uint8 `[PLANES, 4 * words]` of a row: bit `f * BITS` of byte i of a block is the plane's bit of column
    `f * 8 BITS + i`.
    """
    SPAN: tl.constexpr = 8 * BITS
    FIELDS: tl.constexpr = 8 // BITS
    fields = tl.reshape(code, [SIZE // 64, FIELDS, SPAN])
    shift = tl.arange(0, FIELDS)[None, :, None] * BITS
    at = first // 64 * SPAN + tl.arange(0, SIZE // 64 * SPAN)
    for plane in tl.static_range(0, PLANES):
        byte = tl.sum(((fields >> plane) & 1) << shift, 1)
        begin = out + plane * (4 * words)
        tl.store(begin + at, tl.reshape(byte, [SIZE // 64 * SPAN]).to(tl.uint8), mask=at < 4 * words)


@triton.jit
def tile_at(number, rows, outputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, BAND: tl.constexpr):
    """Which tile of a product a program makes: its places along the rows and along the outputs.

    Tiles that read the same rows run beside each other, BAND columns of tiles at a time.
    """
    tiles_n = tl.cdiv(outputs, OUTPUTS)
    tiles_m = tl.cdiv(rows, ROWS)
    band = number // (BAND * tiles_m)
    wide = tl.minimum(tiles_n - band * BAND, BAND)
    inside = number % (BAND * tiles_m)
    return inside // wide, band * BAND + inside % wide
