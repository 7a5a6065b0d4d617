"""Sizes of tiles and pieces for a call: by shape and width, before anything was timed on a GPU.

Whoever has one tunes here. No number of this file changes a bit of any result.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

WHOLE_ROW = 4096
"""Longest row that a program holds in registers; longer ones are read twice, the second time from the cache."""
_PIECE = 4096
_DECODE_ROWS = 16


def power_of_two(number: int) -> int:
    """The least one that is not below a number."""
    return 1 << max(0, number - 1).bit_length()


def warps(size: int) -> int:
    """Of a program that holds `size` numbers: 16 to 32 a thread."""
    return min(16, max(1, size // 512))


def row_warps(size: int) -> int:
    """Of a program of a whole row, which also holds its statistic: 8 numbers a thread, or registers spill."""
    return min(16, max(1, size // 256))


def coding_warps(size: int) -> int:
    """Of a program that codes rows: 32 numbers a thread, over which what does not grow with them is shared out."""
    return min(16, max(1, size // 1024))


def coded_row(columns: int, least: int) -> tuple[int, bool]:
    """As `whole_row`, for the coding of rows."""
    size = max(power_of_two(columns), least)
    return (size, True) if size <= max(2 * WHOLE_ROW, least) else (max(_PIECE, least), False)


def rows_each(rows: int, available: int) -> int:
    """Rows that a program codes one after the other, its table made once: 8 where every multiprocessor is busy."""
    return max(1, min(8, rows // (8 * available)))


def fast_double(x: Tensor) -> bool:
    """Whether the device has units for fp64 in number: A100, H100, B200, and the interpreter."""
    return not x.is_cuda or _capability(x.device.index) in ((8, 0), (9, 0), (10, 0))


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def whole_row(columns: int, least: int) -> tuple[int, bool]:
    """Numbers that a program of a row holds, and whether they are the row; at least `least` of them."""
    size = max(power_of_two(columns), least)
    return (size, True) if size <= max(WHOLE_ROW, least) else (max(_PIECE, least), False)


def piece(columns: int, block: int) -> int:
    """Columns of a program where a row is shared out: at least a block of the rotation."""
    return max(min(power_of_two(columns), 2048), block)


def group(bits: int) -> int:
    """Blocks of 64 columns whose bytes are unpacked together: tensor cores take 32 columns or more of a field."""
    return 4 if bits == 1 else 2


@dataclass(frozen=True)
class Tiles:
    """Of a product: rows and outputs of a program, pieces of the columns, and how programs are launched."""

    rows: int
    outputs: int
    splits: int
    warps: int
    stages: int


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors of the device that a tensor is on."""
    return _processors(x.device.index) if x.is_cuda else 1


def tiles(rows: int, outputs: int, blocks: int, bits: int, available: int) -> Tiles:
    """Tiles of a product on tensor cores.

    Args:
        rows: of the input.
        outputs: of the layer.
        blocks: of 64 columns.
        bits: of a weight.
        available: multiprocessors.
    """
    if rows <= _DECODE_ROWS:  # bound by reading the weights: enough programs to keep all of the memory busy
        size = 64
        steps = -(-blocks // group(bits))
        wanted = 2 * available // -(-outputs // size)
        return Tiles(_DECODE_ROWS, size, max(1, min(16, steps, wanted)), 4, 4)
    if rows <= 64:
        return Tiles(power_of_two(max(rows, 32)), 64, 1, 4, 4)
    # Three bits hold two tiles of bytes: half the rows, or the registers of a thread run out.
    return Tiles(64 if bits == 3 else 128, 128, 1, 8, 3)


PLANE_ROWS = 4
"""Rows up to which 1- and 2-bit products run on bit planes."""


def plane_tile(words: int) -> tuple[int, int]:
    """Outputs and words of a program on bit planes."""
    return 32, min(power_of_two(words), 64)
