"""Nested widths of one quantizer: each a number of bits, its levels, and the name of its scale.

Thresholds Phi^-1(i / 2^b) are those of b + 1 bits with an even i, to the last bit, since i / 2^b and 2i / 2^(b+1) are
one number. So the number of thresholds below a value at b bits is that at b + 1 bits shifted right by one, ties
included, and the codes of all widths are prefixes of the widest one's. That holds for Gaussian thresholds only.

The grid is half-integer at every width (levels +-1/2, +-3/2, ...), so that levels are nested about zero too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from bellbox.core.grid import Levels
from bellbox.core.planes import check_widths
from bellbox.errors import BellboxError


class Width(NamedTuple):
    """One width of a quantizer."""

    bits: int
    levels: Levels
    gamma: str
    """Name of the parameter that is its scale; that of the widest is `gamma`."""


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


class HasWidths(Protocol):
    """A quantizer, as far as its width goes."""

    @property
    def widths(self) -> tuple[int, ...]:
        """See `Quantizer`."""
        ...

    @property
    def levels(self) -> Levels:
        """See `Quantizer`."""
        ...

    def use_bits(self, bits: int) -> None:
        """See `Quantizer`."""
        ...


@contextmanager
def at_bits(quantizer: HasWidths, bits: int) -> Iterator[None]:
    """Within it the quantizer has one of its widths; one that has a single width stays as it is."""
    if not quantizer.widths:
        yield
        return
    before = quantizer.levels.n.bit_length() - 1
    quantizer.use_bits(bits)
    try:
        yield
    finally:
        quantizer.use_bits(before)
