"""Weight codes into the layout that products read, and back (`bellbox.ops.weight_layout`)."""
# Triton's language looks like Python and is none: `tl.constexpr` is a number, a pointer plus a number a pointer.
# So types are not checked here (`ignore` of pyright in pyproject.toml).

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _fields(codes, row, first, rows, columns, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Bytes of 16 rows x 64 columns of values of `BITS` bits, from bit `PLANE` of the codes on: `[2 BITS, 16, 4]`."""
    at = tl.arange(0, 128 * BITS)
    vector, r, c = at // 64, row * 16 + at // 4 % 16, at % 4
    byte = tl.zeros([128 * BITS], tl.int32)
    for field in tl.static_range(0, 8 // BITS):
        column = first + field * 8 * BITS + vector * 4 + c
        inside = (r < rows) & (column < columns)
        code = tl.load(codes + r.to(tl.int64) * columns + column, mask=inside, other=0).to(tl.int32)
        byte += ((code >> PLANE) & ((1 << BITS) - 1)) << (field * BITS)
    return byte.to(tl.uint8)


@triton.jit
def prepack(codes, out, rows, columns, blocks, BITS: tl.constexpr):
    """A tile of 16 rows x 64 columns. Program ids: rows, columns."""
    tile, block = tl.program_id(0), tl.program_id(1)
    start = out + (tile.to(tl.int64) * blocks + block) * (128 * BITS)
    if BITS == 3:
        low = _fields(codes, tile, block * 64, rows, columns, 0, 2)
        tl.store(start + tl.arange(0, 256), low)
        tl.store(start + 256 + tl.arange(0, 128), _fields(codes, tile, block * 64, rows, columns, 2, 1))
    else:
        tl.store(start + tl.arange(0, 128 * BITS), _fields(codes, tile, block * 64, rows, columns, 0, BITS))


@triton.jit
def sums_of_rows(codes, out, rows, columns, places, SIZE: tl.constexpr):
    """int32 sum of the codes of a row at one of its places. Program ids: row, place."""
    row, place = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = columns // places
    total = tl.zeros([], tl.int32)
    for first in range(0, length, SIZE):
        column = first + tl.arange(0, SIZE)
        at = codes + row * columns + place * length + column
        total += tl.sum(tl.load(at, mask=column < length, other=0).to(tl.int32))
    tl.store(out + place * rows + row, total)


@triton.jit
def _codes(weight, row, column, inside, blocks, BITS: tl.constexpr):
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    tile = weight + (row // 16 * blocks + column // 64) * (128 * BITS) + 4 * (row % 16)
    part = column % 64
    i = part % (8 * LOW)
    byte = tl.load(tile + i // 4 * 64 + i % 4, mask=inside, other=0).to(tl.int32)
    code = (byte >> (part // (8 * LOW) * LOW)) & ((1 << LOW) - 1)
    if BITS == 3:
        i = part % 8
        byte = tl.load(tile + 256 + i // 4 * 64 + i % 4, mask=inside, other=0).to(tl.int32)
        code = code | (((byte >> (part // 8)) & 1) << 2)
    return code


@triton.jit
def unpack(weight, out, rows, columns, blocks, SIZE: tl.constexpr, BITS: tl.constexpr):
    """uint8 codes. Program ids: row, SIZE columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < columns
    code = _codes(weight, row, column, inside, blocks, BITS)
    tl.store(out + row * columns + column, code.to(tl.uint8), mask=inside)


@triton.jit
def unpack_in_place_of_rows(
    weight, out, columns, padded, blocks, SIZE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr
):
    """int8 codes `[rows, padded]` in the order in which rows are coded for products (`steps.place`), zeros behind them.

    Program ids: row, SIZE places.
    """
    SPAN: tl.constexpr = 16 if BITS == 3 else 8 * BITS
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = at % (64 * GROUP)
    column = (
        at - inside + inside // (GROUP * SPAN) * SPAN + inside % (GROUP * SPAN) // SPAN * 64 + inside % SPAN
    )
    code = _codes(weight, row, column, column < columns, blocks, BITS)
    tl.store(out + row * padded + at, tl.where(column < columns, code, 0).to(tl.int8), mask=at < padded)
