"""Nested widths of one quantizer: each a number of bits, its levels, and the name of its scale.

Thresholds Phi^-1(i / 2^b) are those of b + 1 bits with an even i, to the last bit, since i / 2^b and 2i / 2^(b+1) are
one number. So the number of thresholds below a value at b bits is that at b + 1 bits shifted right by one, ties
included, and the codes of all widths are prefixes of the widest one's. That holds for Gaussian thresholds only.

The grid is half-integer at every width (levels +-1/2, +-3/2, ...), so that levels are nested about zero too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bellbox.core.grid import Levels
from bellbox.errors import BellboxError

MOST_BITS = 7
"""Half-integer levels of 8 bits are odd integers beyond int8."""


class Width(NamedTuple):
    """One width of a quantizer."""

    bits: int
    levels: Levels
    gamma: str
    """Name of the parameter that is its scale; that of the widest is `gamma`."""


def check_widths(bits: Sequence[int]) -> None:
    """Refuse what is no list of nested widths.

    Raises:
        BellboxError: fewer than two, one beyond 1 to 7, or not the widest first.
    """
    said = ", ".join(map(str, bits))
    if any(type(each) is not int or not 1 <= each <= MOST_BITS for each in bits):
        raise BellboxError(f"nested widths {said}: must be whole numbers of bits from 1 to {MOST_BITS}")
    if len(bits) < 2 or list(bits) != sorted(set(bits), reverse=True):
        raise BellboxError(f"nested widths {said}: must be at least two, the widest first, such as 4, 3, 2, 1")


def option_of(bits: Sequence[int]) -> str:
    """The option `nested` of a quantizer, as plain data: `4,3,2,1`.

    Raises:
        BellboxError: as `check_widths`.
    """
    check_widths(bits)
    return ",".join(map(str, bits))


def widths_of(option: str, widest: Levels) -> list[Width]:
    """The widths that an option names; none of an empty one.

    Args:
        option: as `option_of` gives it.
        widest: levels of the widest.

    Raises:
        BellboxError: no list of widths, or one that does not begin with these levels.
    """
    if not option:
        return []
    try:
        bits = [int(each) for each in option.split(",")]
    except ValueError:
        raise BellboxError(f"nested {option!r}: must be widths in bits, such as 4,3,2,1") from None
    check_widths(bits)
    if widest.n != 2 ** bits[0]:
        raise BellboxError(f"nested {option!r}: the widest has {2 ** bits[0]} levels, not {widest.n}")
    if widest.multiplier != 2:
        raise BellboxError(
            f"nested {option!r}: the grid is half-integer at all widths, so a zero point of "
            f"{widest.zero_point:g} does not fit; leave it out"
        )
    narrow = [Width(each, Levels.gaussian(2**each, widest.zero_point), f"gamma_{each}") for each in bits[1:]]
    return [Width(bits[0], widest, "gamma"), *narrow]
