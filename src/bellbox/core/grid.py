"""The integers that a quantizer may use: how many, where they sit, and where one ends and the next begins.

Every path (fake quantization, packed inference, kernels, exports) decides codes by comparing with the same
fp32 thresholds, so the thresholds live here, once, rounded to fp32 once.

Codes are the stored integers 0..n-1. Levels are the values that codes stand for in the compute domain,
`q = code - n/2 - zero_point`: that is a `Grid`. Thresholds are the n-1 decision boundaries on the normalised input, a
value exactly on a threshold belongs to the upper code: with them it is `Levels`.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from bellbox.errors import BellboxError

MAX_LEVELS = 256


def _float32(value: float) -> float:
    """The nearest fp32 value, as a Python float: what a kernel will really compare with; infinite beyond fp32."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


def strictly_rising(values: Iterable[float]) -> tuple[float, ...]:
    """fp32 thresholds from values that may be equal: each is at least the next fp32 number after the one before."""
    rising: list[float] = []
    for value in map(_float32, values):
        rising.append(value if not rising or value > rising[-1] else _next_float32(rising[-1]))
    return tuple(rising)


def _next_float32(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(math.inf)))


def check_levels(n: int) -> None:
    """Refuse what is not a whole number of levels from 2 to 256.

    Raises:
        BellboxError: such a number.
    """
    if type(n) is not int or not 2 <= n <= MAX_LEVELS:
        raise BellboxError(f"{n} levels: choose 2 to {MAX_LEVELS} (bits=1 to 8, or levels=3 for ternary)")


def check_zero_point(zero_point: float) -> None:
    """Refuse what is not a multiple of 1/2, or so large that it cannot be a shift of at most 256 levels.

    Raises:
        BellboxError: such a number.
    """
    if not abs(zero_point) <= MAX_LEVELS or zero_point * 2 != round(zero_point * 2):
        raise BellboxError(f"zero point {zero_point}: must be a multiple of 1/2, such as 0 or -0.5")


def default_zero_point(n: int) -> float:
    """0 for 8 levels and more that are even in number (levels -4..3); -1/2 below and for odd numbers.

    With -1/2 the levels are symmetric about zero: +-1/2, +-3/2 for n = 4, and -1, 0, 1 for n = 3
    (BBQ's released code: 0 at 3 and 4 bits, -1/2 at 1 and 2 bits).
    """
    return 0.0 if n >= 8 and n % 2 == 0 else -0.5


@dataclass(frozen=True)
class Grid:
    """n integer levels `code - n/2 - zero_point`: all that a matrix product needs to know.

    Raises:
        BellboxError: n outside 2..256, or a zero point that is not a multiple of 1/2.

    Examples:
        >>> from bellbox.core.grid import Grid
        >>> Grid(4, -0.5).integers, Grid(4, 0.0).integers
        ((-3, -1, 1, 3), (-2, -1, 0, 1))
    """

    n: int
    """Number of levels; 2**bits for whole bits, 3 for ternary."""
    zero_point: float
    """Shift of the integer grid, in levels; a multiple of 1/2."""

    def __post_init__(self) -> None:
        check_levels(self.n)
        check_zero_point(self.zero_point)
        object.__setattr__(self, "zero_point", float(self.zero_point))

    @property
    def bits(self) -> float:
        """Information that a code can carry, log2(n): 1.585 for ternary."""
        return math.log2(self.n)

    @property
    def offset(self) -> float:
        """What is subtracted from a code to give its level: n/2 + zero_point."""
        return self.n / 2 + self.zero_point

    @property
    def multiplier(self) -> int:
        """2 where levels are half-integers (so that 2q is an odd integer), else 1."""
        return 1 if self.offset == int(self.offset) else 2

    @property
    def integers(self) -> tuple[int, ...]:
        """`multiplier * level` of every code: what integer hardware multiplies."""
        multiplier, offset = self.multiplier, self.offset
        return tuple(int(multiplier * (code - offset)) for code in range(self.n))

    @property
    def fits_int8(self) -> bool:
        """Whether `integers` lie within -128..127."""
        multiplier, offset = self.multiplier, self.offset  # asked in every forward: not by way of `integers`
        return multiplier * -offset >= -128 and multiplier * (self.n - 1 - offset) <= 127

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Levels `code - n/2 - zero_point` of codes; exact in `dtype` for n <= 256 (bf16 included up to n = 128)."""
        return codes.to(dtype) - self.offset

    def decode_int8(self, codes: Tensor) -> Tensor:
        """`multiplier * level` of codes, as int8.

        Raises:
            BellboxError: where these integers do not fit int8.
        """
        if not self.fits_int8:
            raise BellboxError(f"{self.n} levels with zero point {self.zero_point} do not fit int8")
        return (
            codes.to(torch.int8 if self.n <= 128 else torch.int16)
            .mul_(self.multiplier)
            .sub_(int(self.multiplier * self.offset))
            .to(torch.int8)
        )


@dataclass(frozen=True)
class Levels(Grid):
    """A grid with n-1 sorted fp32 thresholds: which value gets which code.

    Raises:
        BellboxError: as `Grid`, or thresholds that are not n-1 strictly rising finite numbers.

    Examples:
        >>> from bellbox.core.grid import Levels
        >>> levels = Levels(4, -0.5, (-1.0, 0.0, 1.0))
        >>> levels.encode(torch.tensor([-2.0, -1.0, 0.5, 9.0]))  # a tie goes up
        tensor([0, 1, 2, 3], dtype=torch.uint8)
    """

    thresholds: tuple[float, ...] = field(repr=False)
    """n-1 decision boundaries on the normalised input, each exactly representable in fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        thresholds = tuple(map(_float32, self.thresholds))
        rising = all(a < b for a, b in itertools.pairwise(thresholds))
        if len(thresholds) != self.n - 1 or not rising or not all(map(math.isfinite, thresholds)):
            raise BellboxError(
                f"{self.n} levels need {self.n - 1} thresholds, finite and strictly rising in fp32"
            )
        object.__setattr__(self, "thresholds", thresholds)

    @classmethod
    def gaussian(cls, n: int, zero_point: float | None = None) -> Levels:
        """Levels that a standard normal variable uses equally often: thresholds Phi^-1(i/n).

        Args:
            n: number of levels, 2..256.
            zero_point: multiple of 1/2; `default_zero_point(n)` where None.

        Examples:
            >>> from bellbox.core.grid import Levels
            >>> Levels.gaussian(4).thresholds
            (-0.6744897365570068, 0.0, 0.6744897365570068)
        """
        normal = NormalDist()
        check_levels(n)
        # inv_cdf(1/2) is -0.0 on some platforms and an odd function only to rounding: build one half, mirror it.
        upper = [normal.inv_cdf(i / n) for i in range(n // 2 + 1, n)]
        middle = [0.0] if n % 2 == 0 else []
        thresholds = (*(-t for t in reversed(upper)), *middle, *upper)
        return cls(n, default_zero_point(n) if zero_point is None else zero_point, thresholds)

    @classmethod
    def uniform(cls, n: int, zero_point: float = -0.5, step: float = 1.0) -> Levels:
        """Thresholds halfway between neighbouring levels: rounding to the nearest of `step * level`.

        Args:
            n: number of levels, 2..256.
            zero_point: multiple of 1/2; with -1/2 the levels are symmetric about zero.
            step: what one level is worth on the normalised input.

        Examples:
            >>> from bellbox.core.grid import Levels
            >>> Levels.uniform(4, step=0.5).thresholds
            (-0.5, 0.0, 0.5)
        """
        offset = Grid(n, zero_point).offset
        return cls(n, zero_point, tuple((i - 0.5 - offset) * step for i in range(1, n)))

    @property
    def grid(self) -> Grid:
        """The levels without their thresholds."""
        return Grid(self.n, self.zero_point)

    def encode(self, v: Tensor) -> Tensor:
        """Codes of normalised values: the number of thresholds t with v >= t.

        Args:
            v: any shape, float. NaN compares false everywhere and would get code 0: callers exclude it.

        Returns:
            uint8, the shape of `v`.
        """
        codes = torch.zeros(v.shape, dtype=torch.uint8, device=v.device)
        for threshold in self.thresholds:
            codes += (v >= threshold).view(torch.uint8)
        return codes


def levels_from_bits(bits: int) -> int:
    """2**bits, refusing what is not a whole number from 1 to 8.

    Raises:
        BellboxError: any other value.
    """
    if type(bits) is not int or not 1 <= bits <= 8:  # True is an int to isinstance
        raise BellboxError(f"bits={bits!r}: must be a whole number from 1 to 8 (ternary is levels=3)")
    return 2**bits
