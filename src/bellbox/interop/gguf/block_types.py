"""GGUF's block types that hold one of our grids exactly, and the bytes of their blocks.

A block is a few dozen weights with a scale `d` in fp16. Two kinds are used here, both with every sub-scale the same:

- *signed* types store whole numbers k of a range around zero; a weight is `d k`. Half-integer levels become the odd
  integers 2q, with half the scale;
- *shifted* types store c = 0, 1, 2, ... and a minimum; a weight is `d s c - dmin m` with small whole s and m. With
  d = dmin, s = 2 and m an odd number that is a half-integer grid, and with s = 1 one of whole numbers.

So a weight comes back as an exact multiple of the fp16 number d, and the only thing that is rounded is the scale.

Source of the layouts: llama.cpp, ggml/src/ggml-common.h and `dequantize_row_*` in ggml/src/ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bellbox.core.grid import Grid

Bytes = np.ndarray
"""uint8."""
_Encode = Callable[[np.ndarray, np.ndarray, int, int], list[Bytes]]
"""Stored numbers uint8 `[blocks, block]`, d fp16 `[blocks]`, s and m, to the block's parts, uint8 `[blocks, ...]`."""


@dataclass(frozen=True)
class Fit:
    """How a type holds a grid: code c is stored as `step * c + first`, and d is the scale divided by `divisor`."""

    step: int
    first: int
    divisor: int
    sub_scale: int = 1
    minimum: int = 0


@dataclass(frozen=True)
class BlockType:
    """One type of blocks."""

    name: str
    block: int
    """Weights of a block; it must divide the row."""
    size: int
    """Bytes of a block."""
    lowest: int
    """What the stored number 0 stands for; 0 of a shifted type."""
    count: int
    """Stored numbers: 0 to count - 1."""
    most_minimum: int
    """The largest m of a shifted type; 0 of a signed one."""
    parts: _Encode
    step: int = 1
    """What neighbouring stored numbers differ by: 2 where they stand for -1 and 1."""

    @property
    def bits(self) -> float:
        """Of a weight, scales counted."""
        return 8 * self.size / self.block

    def fit(self, grid: Grid) -> Fit | None:
        """How it holds a grid exactly; None where it cannot."""
        if self.most_minimum:
            minimum = round(grid.multiplier * grid.offset)
            if grid.n > self.count or not 0 <= minimum <= self.most_minimum:
                return None
            return Fit(1, 0, grid.multiplier, grid.multiplier, minimum)
        stored = [(k - self.lowest) / self.step for k in grid.integers]
        if min(stored) < 0 or max(stored) >= self.count or any(s != int(s) for s in stored):
            return None
        return Fit(int(stored[1] - stored[0]), int(stored[0]), grid.multiplier)

    def encode(self, stored: np.ndarray, scale: np.ndarray, fit: Fit) -> Bytes:
        """The bytes of rows.

        Args:
            stored: uint8 `[rows, columns]`, the type's own numbers.
            scale: d, fp16 `[rows, columns / block]`.
            fit: of the grid.

        Returns:
            uint8 `[rows, row bytes]`.
        """
        rows, columns = stored.shape
        parts = self.parts(stored.reshape(-1, self.block), scale.reshape(-1), fit.sub_scale, fit.minimum)
        blocks = np.concatenate(parts, axis=1)
        assert blocks.shape == (rows * columns // self.block, self.size)
        return blocks.reshape(rows, -1)


def _half(d: np.ndarray) -> Bytes:
    return d.astype("<f2").view(np.uint8).reshape(-1, 2)


def _constant(blocks: int, values: list[int]) -> Bytes:
    return np.tile(np.array(values, dtype=np.uint8), (blocks, 1))


def _joined(q: np.ndarray, bits: int) -> Bytes:
    """`[blocks, groups, 8 / bits, bytes]` of small numbers to `[blocks, groups * bytes]`, the first in the low bits."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    return np.bitwise_or.reduce(q << shifts, axis=2).reshape(len(q), -1)


def _two_bits(q: np.ndarray) -> Bytes:
    """256 numbers of 2 bits: byte j of each 32 has numbers j, j + 32, j + 64, j + 96 of a run of 128."""
    return _joined(q.reshape(-1, 2, 4, 32), 2)


def _nibbles(q: np.ndarray, run: int) -> Bytes:
    """Byte j of each run holds number j in its low half, and number j + run in its high half."""
    return _joined(q.reshape(len(q), -1, 2, run), 4)


def _high_bits(bit: np.ndarray) -> Bytes:
    """256 bits: bit i of byte j is that of number 32 i + j."""
    return _joined(bit.reshape(-1, 1, 8, 32), 1)


def _scales_of_six_bits(s: int, m: int) -> list[int]:
    """Eight equal scales s and minimums m of 6 bits, as Q4_K and Q5_K interleave them."""
    return [s | (s >> 4) << 6] * 4 + [m & 63 | (m >> 4) << 6] * 4 + [s & 15 | (m & 15) << 4] * 4


def _q1_0(q: np.ndarray, d: np.ndarray, *_: int) -> list[Bytes]:
    return [_half(d), np.packbits(q, axis=1, bitorder="little")]


def _tq2_0(q: np.ndarray, d: np.ndarray, *_: int) -> list[Bytes]:
    return [_two_bits(q), _half(d)]


def _q2_k(q: np.ndarray, d: np.ndarray, s: int, m: int) -> list[Bytes]:
    return [_constant(len(q), [s | m << 4] * 16), _two_bits(q), _half(d), _half(d)]


def _q3_k(q: np.ndarray, d: np.ndarray, *_: int) -> list[Bytes]:
    one = [0x11] * 8 + [0xAA] * 4  # sixteen scales of 6 bits, each 32 + 1
    return [_high_bits(q >> 2), _two_bits(q & 3), _constant(len(q), one), _half(d)]


def _q4_0(q: np.ndarray, d: np.ndarray, *_: int) -> list[Bytes]:
    return [_half(d), _nibbles(q, 16)]


def _q4_k(q: np.ndarray, d: np.ndarray, s: int, m: int) -> list[Bytes]:
    return [_half(d), _half(d), _constant(len(q), _scales_of_six_bits(s, m)), _nibbles(q, 32)]


def _q5_0(q: np.ndarray, d: np.ndarray, *_: int) -> list[Bytes]:
    return [_half(d), np.packbits(q >> 4, axis=1, bitorder="little"), _nibbles(q & 15, 16)]


def _q5_k(q: np.ndarray, d: np.ndarray, s: int, m: int) -> list[Bytes]:
    scales = _constant(len(q), _scales_of_six_bits(s, m))
    return [_half(d), _half(d), scales, _high_bits(q >> 4), _nibbles(q & 15, 32)]


def _q6_k(q: np.ndarray, d: np.ndarray, *_: int) -> list[Bytes]:
    return [_nibbles(q & 15, 64), _two_bits(q >> 4), _constant(len(q), [1] * 16), _half(d)]


def _q8_0(q: np.ndarray, d: np.ndarray, *_: int) -> list[Bytes]:
    return [_half(d), q + np.uint8(128)]  # modulo 256: two's complement of k = q - 128


BLOCK_TYPES: tuple[BlockType, ...] = (
    BlockType("Q1_0", 128, 18, -1, 2, 0, _q1_0, step=2),
    BlockType("TQ2_0", 256, 66, -1, 3, 0, _tq2_0),
    BlockType("Q2_K", 256, 84, 0, 4, 15, _q2_k),
    BlockType("Q3_K", 256, 110, -4, 8, 0, _q3_k),
    BlockType("Q4_0", 32, 18, -8, 16, 0, _q4_0),
    BlockType("Q4_K", 256, 144, 0, 16, 63, _q4_k),
    BlockType("Q5_0", 32, 22, -16, 32, 0, _q5_0),
    BlockType("Q5_K", 256, 176, 0, 32, 63, _q5_k),
    BlockType("Q6_K", 256, 210, -32, 64, 0, _q6_k),
    BlockType("Q8_0", 32, 34, -128, 256, 0, _q8_0),
)
"""The narrowest first."""
NAMES = tuple(kind.name for kind in BLOCK_TYPES)


def natural_type(grid: Grid) -> BlockType | None:
    """The narrowest type that holds a grid, whatever the length of a row; None where none does."""
    return next((kind for kind in BLOCK_TYPES if kind.fit(grid)), None)
