"""Codes to bytes and back, row by row.

Two layouts, chosen by the number of levels alone:

- *bits*: code i of a row occupies bits [i*b, (i+1)*b) of the row's little-endian bit string, b = ceil(log2 n).
  So 1-, 2- and 4-bit codes never straddle bytes, and eight 3-bit codes fill exactly three bytes.
- *digits*: where it is denser, d codes share a byte as base-n digits, the first code least significant. For
  ternary d = 5 (3^5 = 243): 1.6 bits a code instead of 2.

Rows start on a byte; the unused end of a row's last byte is zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bellbox.errors import BellboxError


def code_width(n: int) -> int:
    """Bits that hold one code of n levels on its own, ceil(log2 n)."""
    return (n - 1).bit_length()


def digits_per_byte(n: int) -> int | None:
    """Codes per byte in the *digits* layout, or None where the *bits* layout is at least as dense."""
    digits = 1
    while n ** (digits + 1) <= 256:
        digits += 1
    return digits if digits * code_width(n) > 8 else None


def row_bytes(columns: int, n: int) -> int:
    """Bytes of a packed row of `columns` codes."""
    digits = digits_per_byte(n)
    return -(-columns // digits) if digits else -(-columns * code_width(n) // 8)


def pack(codes: Tensor, n: int) -> Tensor:
    """Pack codes row by row.

    Args:
        codes: uint8 `[rows, columns]`, values 0..n-1.
        n: number of levels, 2..256.

    Returns:
        uint8 `[rows, row_bytes(columns, n)]`.

    Raises:
        BellboxError: a code of n or more.
    """
    if codes.numel() and int(codes.max()) >= n:
        raise BellboxError(f"code {int(codes.max())} cannot be packed: {n} levels have codes 0 to {n - 1}")
    rows, columns = codes.shape
    digits = digits_per_byte(n)
    if digits:
        padded = torch.nn.functional.pad(codes, (0, -columns % digits)).view(rows, -1, digits)
        place = torch.tensor([n**i for i in range(digits)], dtype=torch.uint8, device=codes.device)
        return (padded * place).sum(-1, dtype=torch.uint8)
    width = code_width(n)
    if width in (1, 2, 4):  # whole codes in a byte: no detour through single bits
        padded = torch.nn.functional.pad(codes, (0, -columns % (8 // width))).view(rows, -1, 8 // width)
        shift = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
        return (padded << shift).sum(-1, dtype=torch.uint8)
    bits = (codes.unsqueeze(-1) >> torch.arange(width, dtype=torch.uint8, device=codes.device)) & 1
    bits = torch.nn.functional.pad(bits.view(rows, -1), (0, -columns * width % 8)).view(rows, -1, 8)
    place = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (bits << place).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, columns: int, n: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 `[rows, row_bytes(columns, n)]`.
        columns: number of codes in a row.
        n: number of levels.

    Returns:
        uint8 `[rows, columns]`. Bytes that `pack` cannot have written (a digit layout above n**d - 1, a 3-bit
        layout of 5 levels) may give codes of n or more; `io.load` refuses them.

    Raises:
        BellboxError: the row length does not fit.
    """
    if packed.dim() != 2 or packed.shape[1] != row_bytes(columns, n):
        raise BellboxError(
            f"packed shape {tuple(packed.shape)} does not hold rows of {columns} codes of {n} levels: "
            f"expected {row_bytes(columns, n)} bytes a row"
        )
    rows = packed.shape[0]
    digits = digits_per_byte(n)
    if digits:
        place = torch.tensor([n**i for i in range(digits)], dtype=torch.uint8, device=packed.device)
        codes = packed.unsqueeze(-1) // place
        codes[..., :-1] %= n  # the last digit keeps its excess, so that an impossible byte shows
        return codes.view(rows, -1)[:, :columns].contiguous()
    width = code_width(n)
    if width in (1, 2, 4):
        shift = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
        codes = (packed.unsqueeze(-1) >> shift) & (2**width - 1)
        return codes.view(rows, -1)[:, :columns].contiguous()
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (
        ((packed.unsqueeze(-1) >> place) & 1).view(rows, -1)[:, : columns * width].view(rows, columns, width)
    )
    return (bits << torch.arange(width, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)


def unpack_slabs(packed: Tensor, columns: int, n: int, codes: int = 1 << 18) -> Iterator[Tensor]:
    """`unpack`, some rows at a time: a multiple of 16 rows, about `codes` codes, the last slab with what is left."""
    rows = max(16, codes // columns // 16 * 16)
    for first in range(0, len(packed), rows):
        yield unpack(packed[first : first + rows], columns, n)
