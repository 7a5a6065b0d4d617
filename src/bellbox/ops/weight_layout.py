"""Weight codes in the layout that the kernels read, as one tensor: what a packed layer holds, and all that it holds.

The tensor is uint8, one-dimensional. For up to 16 levels (b = ceil(log2 n) bits) it is tiles, then sums:

    [ceil(rows/16)][ceil(columns/64)][2b vectors of 64 bytes], and for b <= 2 int32 [rows] sums of codes; then, where a
    row has several places, [places][rows] sums of the codes at each

A block of 64 columns has 16 groups of 4 columns; byte 4r + c of a vector belongs to row r of 16 and column c of its
group, and bit field f (b bits wide) of vector j is group f * 2b + j. Three bits are four vectors of the low two
bits as for b = 2, then two of the high bit as for b = 1. One layout serves every instruction set
(native/README.md). Places are those of a convolution's filter: their sums say what a window that reaches beyond the
image lacks. A linear layer has one. More than 16 levels are one byte a code, row by row, without sums.

The layout is a function of the codes: `prepack` and `unpack` are inverse, here in torch and in the compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from bellbox.core.grid import check_levels
from bellbox.core.packing import code_width
from bellbox.errors import BellboxError
from bellbox.ops.dispatch import Operation

TILED_LEVELS = 16
"""Most levels that tiles hold."""


def tiles_size(rows: int, columns: int, levels: int) -> int:
    """Bytes of the tiles alone."""
    return -(-rows // 16) * -(-columns // 64) * 2 * code_width(levels) * 64


def packed_size(rows: int, columns: int, levels: int, places: int = 1) -> int:
    """Bytes of the tensor for a matrix of codes."""
    if levels > TILED_LEVELS:
        return rows * columns
    return tiles_size(rows, columns, levels) + 4 * rows * sums_a_row(levels, places)


def sums_a_row(levels: int, places: int) -> int:
    """int32 sums that stand behind the tiles for each row."""
    if levels > 4:
        return 0
    return 1 if places == 1 else 1 + places


def _fields(codes: Tensor, bits: int) -> Tensor:
    """Vectors `[tiles, blocks, 2 * bits, 64]` of values of `bits` bits, `[tiles, 16, blocks, 64]`."""
    vectors, fields = 2 * bits, 8 // bits
    tiles, _, blocks, _ = codes.shape
    # column = 4 * group + c, group = field * vectors + vector
    split = codes.view(tiles, 16, blocks, fields, vectors, 4).permute(0, 2, 3, 4, 1, 5)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device).view(-1, 1, 1, 1)
    return (split << shift).sum(2, dtype=torch.uint8).flatten(3)


def _values(vectors: Tensor, bits: int) -> Tensor:
    """The inverse of `_fields`."""
    tiles, blocks, count, _ = vectors.shape
    shift = torch.arange(0, 8, bits, dtype=torch.uint8, device=vectors.device).view(-1, 1, 1, 1)
    split = (vectors.view(tiles, blocks, 1, count, 16, 4) >> shift) & (2**bits - 1)
    return split.permute(0, 4, 1, 2, 3, 5).reshape(tiles, 16, blocks, 64)


def check_codes(codes: Tensor, levels: int, places: int) -> None:
    """Refuse what is no matrix of codes.

    Raises:
        BellboxError: naming what does not fit.
    """
    check_levels(levels)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise BellboxError(f"codes are {codes.dtype} {tuple(codes.shape)}: uint8 [rows, columns] is needed")
    if places < 1 or codes.shape[1] % places or not codes.shape[1]:
        raise BellboxError(f"codes of {codes.shape[1]} columns have no {places} places")


def check_packed(weight: Tensor, rows: int, columns: int, levels: int) -> None:
    """Refuse what does not hold such a matrix.

    Raises:
        BellboxError: naming what does not fit.
    """
    check_levels(levels)
    fits = weight.dtype == torch.uint8 and weight.dim() == 1 and rows >= 0 and columns >= 1
    if not fits or weight.numel() < packed_size(rows, columns, levels):
        raise BellboxError(
            f"packed weights {weight.dtype} {tuple(weight.shape)} hold no {rows} x {columns} codes of {levels} levels"
        )


def _prepack(codes: Tensor, levels: int, places: int) -> Tensor:
    check_codes(codes, levels, places)
    width = code_width(levels)
    if codes.numel() and width < 8 and int(codes.max()) >> width:
        raise BellboxError(
            f"codes cannot be packed: a code needs more than the {width} bits of {levels} levels"
        )
    rows, columns = codes.shape
    if levels > TILED_LEVELS:
        return codes.reshape(-1).clone()
    bits = code_width(levels)
    padded = F.pad(codes, (0, -columns % 64, 0, -rows % 16)).view(-1, 16, -(-columns // 64), 64)
    low = _fields(padded & 3, 2) if bits == 3 else _fields(padded, bits)
    vectors = torch.cat((low, _fields(padded >> 2, 1)), 2) if bits == 3 else low
    tiles = vectors.reshape(-1)
    if levels > 4:
        return tiles
    sums = codes.view(rows, places, -1).sum(-1, dtype=torch.int32).t()
    if places > 1:
        sums = torch.cat((sums.sum(0, dtype=torch.int32, keepdim=True), sums))
    return torch.cat((tiles, sums.reshape(-1).view(torch.uint8)))


def _unpack(weight: Tensor, rows: int, columns: int, levels: int) -> Tensor:
    check_packed(weight, rows, columns, levels)
    if levels > TILED_LEVELS:
        return weight[: rows * columns].reshape(rows, columns).clone()
    bits, tiles = code_width(levels), -(-rows // 16)
    vectors = weight[: tiles_size(rows, columns, levels)].reshape(tiles, -(-columns // 64), 2 * bits, 64)
    codes = _values(vectors[:, :, :4], 2) if bits == 3 else _values(vectors, bits)
    if bits == 3:
        codes |= _values(vectors[:, :, 4:], 1) << 2
    return codes.view(16 * tiles, -1)[:rows, :columns].contiguous()


prepack_operation = Operation(
    "prepack(Tensor codes, int levels, int places) -> Tensor",
    _prepack,
    lambda codes, levels, places: codes.new_empty(
        packed_size(codes.shape[0], codes.shape[1], levels, places)
    ),
)
unpack_operation = Operation(
    "unpack(Tensor weight, int rows, int columns, int levels) -> Tensor",
    _unpack,
    lambda weight, rows, columns, levels: weight.new_empty(rows, columns),  # noqa: ARG005 (as the operation)
)


def prepack(codes: Tensor, levels: int, places: int = 1) -> Tensor:
    """Codes of a weight matrix as the one tensor that kernels read.

    Args:
        codes: uint8 `[rows, columns]`, below `levels`.
        levels: 2 to 256.
        places: of a filter's window, whose columns come place by place; 1 for a linear layer.

    Returns:
        uint8 `[packed_size(rows, columns, levels, places)]`.

    Raises:
        BellboxError: codes of another shape or dtype.
    """
    return prepack_operation(codes, levels, places)


def unpack(weight: Tensor, rows: int, columns: int, levels: int) -> Tensor:
    """uint8 codes `[rows, columns]` of what `prepack` gave.

    Raises:
        BellboxError: a tensor that does not hold them.
    """
    return unpack_operation(weight, rows, columns, levels)


def prepack_slabs(slabs: Iterable[Tensor], rows: int, columns: int, levels: int, places: int = 1) -> Tensor:
    """`prepack` of a matrix that comes some rows at a time, so that its codes never lie in memory as a whole.

    Args:
        slabs: uint8 `[some rows, columns]` from the first row to the last; each but the last has a multiple of 16 rows.
        rows: of all slabs.
        columns: of each.
        levels: 2 to 256.
        places: see `prepack`.
    """
    out = torch.empty(packed_size(rows, columns, levels, places), dtype=torch.uint8)
    tiles, count = tiles_size(rows, columns, levels), sums_a_row(levels, places)
    sums = out[tiles:].view(torch.int32).view(count, rows) if count else None
    first = 0
    for slab in slabs:
        packed, end = prepack(slab, levels, places), first + len(slab)
        size = packed.numel() - 4 * len(slab) * count
        at = first * columns if levels > TILED_LEVELS else tiles_size(first, columns, levels)
        out[at : at + size] = packed[:size]
        if sums is not None:
            sums[:, first:end] = packed[size:].view(torch.int32).view(count, len(slab))
        first = end
    return out
