"""Bit planes of codes: what lets one file be read at several widths.

Plane 1 holds the highest bit of every code of b bits, plane b the lowest. The first w planes are then the codes shifted
right by b - w, which are the codes of w bits where widths nest. A plane is packed as codes of two levels are
(`core.packing`): bit i of a row is that of code i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bellbox.core.packing import pack, row_bytes, unpack, unpack_slabs
from bellbox.errors import BellboxError

MOST_BITS = 7
"""Widest of nested widths: half-integer levels of 8 bits are odd integers beyond int8."""


def check_widths(bits: Sequence[int]) -> None:
    """Refuse what is no list of nested widths.

    Raises:
        BellboxError: fewer than two, one beyond 1 to 7, or not the widest first.
    """
    said = ", ".join(map(str, bits))
    if any(type(each) is not int or not 1 <= each <= MOST_BITS for each in bits):
        raise BellboxError(f"nested widths {said}: must be whole numbers of bits from 1 to {MOST_BITS}")
    if len(bits) < 2 or list(bits) != sorted(set(bits), reverse=True):
        raise BellboxError(
            f"nested widths {said}: must be at least two, the widest first, such as 4, 3, 2, 1"
        )


def planes_of(packed: Tensor, columns: int, bits: int) -> list[Tensor]:
    """The planes of codes of `bits` bits, the highest first.

    Args:
        packed: codes as `core.packing.pack` gives them, uint8 `[rows, row bytes]`.
        columns: codes of a row.
        bits: of a code.

    Returns:
        uint8 `[rows, ceil(columns / 8)]` each.
    """
    size = row_bytes(columns, 2)
    planes = [packed.new_empty(len(packed), size) for _ in range(bits)]
    first = 0
    for codes in unpack_slabs(packed, columns, 2**bits):
        for place, plane in enumerate(planes):
            plane[first : first + len(codes)] = pack((codes >> (bits - 1 - place)) & 1, 2)
        first += len(codes)
    return planes


def packed_from(planes: Sequence[Tensor], columns: int) -> Tensor:
    """The inverse of `planes_of`; of fewer planes, the codes of as many bits.

    Args:
        planes: as `planes_of` gives them, the highest first.
        columns: codes of a row.

    Returns:
        uint8 `[rows, row bytes]`, codes of `len(planes)` bits.
    """
    n = 2 ** len(planes)
    rows = [pack(codes, n) for codes in _slabs(planes, columns)]
    return torch.cat(rows) if rows else planes[0].new_empty(0, row_bytes(columns, n))


def _slabs(planes: Sequence[Tensor], columns: int) -> Iterator[Tensor]:
    step = max(16, (1 << 18) // columns // 16 * 16)
    for first in range(0, len(planes[0]), step):
        codes = torch.zeros((), dtype=torch.uint8)
        for plane in planes:
            codes = (codes << 1) | unpack(plane[first : first + step], columns, 2)
        yield codes


def has_clean_ends(plane: Tensor, columns: int) -> bool:
    """Whether what is left of each row's last byte is zero."""
    used = columns % 8
    return used == 0 or not bool((plane[:, -1] >> used).any())
