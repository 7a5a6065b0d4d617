"""Rows of a KV cache in int8 or 4 bits: rotate a head, code it, one scale a row.

Zero is a code: a row of zeros stays zeros, and no scale has a floor that small rows would drown in. A row depends on
its own token only, so a coded cache is as causal as the model. The rotation is the bell of a head: one large channel,
as keys have them, is spread over all of them.

In int8 the largest magnitude is 127. 4 bits have one code more on one side, -8 to 7, and the side that reaches farther
gets it, by the sign of the scale: the step is the larger of its reach / 8 and the other side's / 7.5 (7.5 is coded 7,
half a step off). So an error is at most absmax / 254 or absmax / 15, up to fp32 rounding. native/kernels/decoder.h does
the same to the last bit.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from bellbox.core.hadamard import hadamard
from bellbox.errors import BellboxError

CachePrecision = Literal["fp32", "int8", "int4"]
"""What the rows of a cache are in; fp32 stands for the model's own dtype, as it comes."""

_LEAST = 1e-30
"""A row whose largest magnitude is below this is zeros: its scale would have few bits left."""


def check_cache_precision(precision: str) -> None:
    """Whether there is such a cache.

    Raises:
        BellboxError: there is none.
    """
    if precision not in get_args(CachePrecision):
        raise BellboxError(f"a KV cache in {precision!r}: it must be fp32, int8 or int4")


def head_block(head_dim: int) -> int:
    """The block of the rotation: the largest power of two that divides the head; 1 rotates nothing."""
    return head_dim & -head_dim


def row_length(precision: str, head_dim: int) -> int:
    """Bytes of one row of codes."""
    return head_dim if precision == "int8" else (head_dim + 1) // 2


def code_rows(x: Tensor, precision: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows.

    Args:
        x: `[..., head_dim]`, any floating dtype; coded in fp32.
        precision: int8 or int4.
        block: of the rotation, a divisor of head_dim; 1 for none.

    Returns:
        int8 `[..., head_dim]`, or uint8 `[..., ceil(head_dim / 2)]`: of 4 bits, byte i has the code of number i, plus
        8, in its low half, and that of number i + ceil(head_dim / 2) in its high half; and scales fp32 `[...]`, which
        are NaN where a row is not finite.
    """
    x = hadamard(x.float(), block) if block > 1 else x.float()
    above, below = x.amax(dim=-1, keepdim=True).clamp(min=0), (-x).amax(dim=-1, keepdim=True).clamp(min=0)
    larger = torch.maximum(above, below)
    finite = larger.isfinite()
    usable = finite & (larger >= _LEAST)
    if precision == "int8":
        most, scales, factor = 127, larger / 127, 127 / larger
    else:
        step = torch.maximum(larger / 8, torch.minimum(above, below) / 7.5)
        most, scales = 7, torch.where(above > below, -step, step)
        factor = 1 / scales
    codes = torch.where(usable, (x * factor).round().clamp(max=most), 0.0).to(torch.int8)
    scales = torch.where(finite, torch.where(usable, scales, 0.0), torch.nan)[..., 0]
    if precision == "int8":
        return codes, scales
    half = row_length(precision, x.shape[-1])
    nibbles = (codes + 8).to(torch.uint8)
    low, high = nibbles[..., :half], nibbles[..., half:]
    return torch.nn.functional.pad(high, (0, half - high.shape[-1])) << 4 | low, scales


def decode_rows(codes: Tensor, scales: Tensor, head_dim: int, block: int) -> Tensor:
    """What `code_rows` made, as fp32 `[..., head_dim]`, rotated back."""
    if codes.dtype == torch.uint8:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)[..., :head_dim].to(torch.int8) - 8
    x = codes.float() * scales[..., None]
    return hadamard(x, block) if block > 1 else x
