"""Cosines and sines of rotary positions, the same bits wherever they are made (`native/layers/rotary.h`).

A library's cosine of an fp32 number differs from another's in the last bit. These are products and sums of fp64 in a
fixed order, rounded to fp32 once, hence right to its last bit but for one number in some 100 million.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bellbox.ops import native

_SLAB = 1 << 16
"""Angles at once, which stay in a cache."""
_EVEN = (1 / 479001600, -1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1.0)
_ODD = (-1 / 39916800, 1 / 362880, -1 / 5040, 1 / 120, -1 / 6)
MOST_POSITIONS = 1 << 20
"""Up to which whole quarter turns are taken off exactly."""


def rotary_tables(theta: float, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, on the CPU.

    Args:
        theta: base of the frequencies theta^(-2i / head_dim), each rounded to fp32 as Hugging Face does.
        head_dim: of attention, even.
        positions: of a text.

    Returns:
        both fp32 `[positions, head_dim / 2]`.
    """
    module = native.compiled() if native.available() else None
    if module is not None and positions <= MOST_POSITIONS:
        cosines, sines = torch.empty(2, positions, head_dim // 2).unbind()
        module.rotary(theta, head_dim, positions, cosines, sines)
        return cosines, sines
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (torch.tensor(theta, dtype=torch.float64) ** exponents.double()).float()
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    slabs = [_turn(each) for each in angles.double().reshape(-1).split(_SLAB)]
    cosines, sines = (torch.cat(each).view_as(angles) for each in zip(*slabs, strict=True))
    return cosines, sines


def _turn(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of fp64 angles: what is left of whole quarter turns, by Taylor's series."""
    magic = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to a whole number
    n = (angle * 0.63661977236758138 + magic) - magic
    r = (angle - n * 1.5707963267341256) - n * 6.0771005065061922e-11  # pi/2 in two parts
    s = r * r
    even, odd = torch.full_like(s, -1 / 87178291200), torch.full_like(s, 1 / 6227020800)
    for factor in _EVEN:
        even = factor + s * even
    for factor in _ODD:
        odd = factor + s * odd
    odd = r + r * (s * odd)
    quarter = n.long() & 3
    swapped = quarter % 2 == 1
    cosine, sine = torch.where(swapped, odd, even), torch.where(swapped, even, odd)
    cosine = torch.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    return cosine.float(), torch.where(quarter >= 2, -sine, sine).float()
