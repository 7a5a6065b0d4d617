from __future__ import annotations

import math
import struct

import pytest
import torch

from bellbox.core.grid import Grid, Levels, default_zero_point, levels_from_bits, strictly_rising
from bellbox.errors import BellboxError

# The decision boundaries as the method's description prints them, five digits.
PRINTED = {
    2: (0.0,),
    4: (-0.67449, 0.0, 0.67449),
    8: (-1.15035, -0.67449, -0.31864, 0.0, 0.31864, 0.67449, 1.15035),
    16: tuple(
        sign * t
        for sign, half in (
            (-1, (1.53412, 1.15035, 0.88715, 0.67449, 0.48878, 0.31864, 0.15731)),
            (1, (0.0, 0.15731, 0.31864, 0.48878, 0.67449, 0.88715, 1.15035, 1.53412)),
        )
        for t in half
    ),
    3: (-0.43073, 0.43073),
}
LEVELS = {
    2: (-0.5, 0.5),
    3: (-1, 0, 1),
    4: (-1.5, -0.5, 0.5, 1.5),
    8: tuple(range(-4, 4)),
    16: tuple(range(-8, 8)),
    5: (-2, -1, 0, 1, 2),
    6: (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5),
}


@pytest.mark.parametrize("n", PRINTED)
def test_thresholds_are_those_of_the_method(n):
    assert Levels.gaussian(n).thresholds == pytest.approx(PRINTED[n], abs=6e-6)


@pytest.mark.parametrize("n", range(2, 257))
def test_any_number_of_levels_is_symmetric_fp32_and_equally_likely(n):
    levels = Levels.gaussian(n)
    thresholds = levels.thresholds
    assert len(thresholds) == n - 1
    assert all(struct.unpack("f", struct.pack("f", t))[0] == t for t in thresholds)
    assert thresholds == tuple(-t for t in reversed(thresholds))
    below = [0.5 * math.erfc(-t / math.sqrt(2)) for t in thresholds]
    assert below == pytest.approx([i / n for i in range(1, n)], abs=1e-7)
    assert math.copysign(1, thresholds[n // 2 - 1]) == 1.0 or n % 2  # the middle one is +0.0, not -0.0


@pytest.mark.parametrize("n", LEVELS)
def test_levels_and_zero_points(n):
    levels = Levels.gaussian(n)
    codes = torch.arange(n, dtype=torch.uint8)
    assert tuple(levels.decode(codes).tolist()) == LEVELS[n]
    assert levels.integers == tuple(int(levels.multiplier * q) for q in LEVELS[n])
    assert levels.multiplier == (1 if all(q == int(q) for q in LEVELS[n]) else 2)
    assert levels.bits == math.log2(n)


def test_default_zero_point_is_a_half_below_three_bits_and_for_odd_numbers():
    assert [default_zero_point(n) for n in (2, 3, 4, 8, 9, 16, 256)] == [-0.5, -0.5, -0.5, 0, -0.5, 0, 0]


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 16, 100, 256])
def test_a_tie_goes_up_and_its_neighbour_below_does_not(n):
    levels = Levels.gaussian(n)
    at = torch.tensor(levels.thresholds)
    below = torch.nextafter(at, torch.tensor(-torch.inf))
    assert levels.encode(at).tolist() == list(range(1, n))
    assert levels.encode(below).tolist() == list(range(n - 1))
    assert levels.encode(torch.tensor([-torch.inf, torch.inf])).tolist() == [0, n - 1]
    assert levels.encode(at.double()).tolist() == list(range(1, n))


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16, 100, 127, 128, 129, 200, 255, 256])
def test_int8_levels_are_the_multiplied_levels(n):
    levels = Levels.gaussian(n)
    codes = torch.arange(n, dtype=torch.uint8)
    if levels.fits_int8:
        assert levels.decode_int8(codes).tolist() == list(levels.integers)
        assert levels.decode_int8(codes).dtype == torch.int8
    else:
        with pytest.raises(BellboxError, match="int8"):
            levels.decode_int8(codes)
    halves = Levels.gaussian(n, -0.5 if n % 2 == 0 else 0.0)
    assert halves.multiplier == 2
    if n <= 128:
        assert halves.decode_int8(codes).tolist() == [2 * k - n + (1 if n % 2 == 0 else 0) for k in range(n)]


def test_erf_formula_agrees_away_from_ties():
    v = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n in (2, 3, 4, 8, 16):
        box = n * 0.5 * torch.erfc(-v / math.sqrt(2))
        away = (box - box.round()).abs() > 1e-6
        assert away.float().mean() > 0.999
        assert torch.equal(
            Levels.gaussian(n).encode(v)[away], box.floor().clamp(0, n - 1)[away].to(torch.uint8)
        )


@pytest.mark.parametrize("n", [-1, 0, 1, 257, 2.0, True, "4", None])
def test_a_number_of_levels_out_of_range_is_refused(n):
    with pytest.raises(BellboxError, match="levels"):
        Levels.gaussian(n)


@pytest.mark.parametrize(
    ("zero_point", "thresholds"),
    [
        (0.25, (0.0,)),
        (math.nan, (0.0,)),
        (math.inf, (0.0,)),
        (1e308, (0.0,)),
        (0.0, ()),
        (0.0, (0.0, 1.0)),
        (0.0, (math.nan,)),
        (0.0, (math.inf,)),
        (0.0, (1e300,)),
    ],
)
def test_impossible_two_level_grids_are_refused(zero_point, thresholds):
    with pytest.raises(BellboxError):
        Levels(2, zero_point, thresholds)


def test_thresholds_must_rise_in_fp32_not_only_in_fp64():
    with pytest.raises(BellboxError, match="fp32"):
        Levels(3, -0.5, (0.1, 0.1 + 1e-12))
    with pytest.raises(BellboxError, match="rising"):
        Levels(3, -0.5, (1.0, -1.0))


def test_levels_are_values():
    assert Levels.gaussian(4) == Levels.gaussian(4, -0.5)
    assert Levels.gaussian(4) != Levels.gaussian(4, 0)
    assert hash(Levels.gaussian(4)) == hash(Levels.gaussian(4))
    assert isinstance(Levels.gaussian(4, 0).zero_point, float)


def test_bits():
    assert [levels_from_bits(b) for b in (1, 2, 3, 4, 8)] == [2, 4, 8, 16, 256]
    for bad in (0, 9, 1.5, True, "2"):
        with pytest.raises(BellboxError, match="bits"):
            levels_from_bits(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16, 255])
@pytest.mark.parametrize("zero_point", [-0.5, 0.0])
@pytest.mark.parametrize("step", [1.0, 0.37])
def test_uniform_thresholds_round_to_the_nearest_level(n, zero_point, step):
    levels = Levels.uniform(n, zero_point, step)
    v = torch.linspace(-n, n, 4001, dtype=torch.float64) * step
    values = step * levels.decode(torch.arange(n), torch.float64)
    nearest = (v[:, None] - values).abs().argmin(-1)
    middle = (v[:, None] - torch.tensor(levels.thresholds, dtype=torch.float64)).abs().amin(-1) < 1e-5
    assert torch.equal(levels.encode(v).long()[~middle], nearest[~middle])


def test_a_grid_is_levels_without_thresholds():
    levels = Levels.gaussian(16)
    assert levels.grid == Grid(16, 0.0)
    assert levels.grid.integers == levels.integers == tuple(range(-8, 8))
    assert levels.grid != levels
    with pytest.raises(BellboxError, match="zero point"):
        Grid(4, 0.25)


def test_equal_values_become_the_next_thresholds():
    assert strictly_rising([0.0, 0.5]) == (0.0, 0.5)
    a, b, c, d = strictly_rising([1.0, 1.0, 0.5, 2.0])
    assert (a, d) == (1.0, 2.0)
    assert b == 1.0 + 2.0**-23
    assert c == 1.0 + 2.0**-22
    assert Levels(4, -0.5, strictly_rising([0.0, 0.0, 0.0])).thresholds[0] == 0.0


def test_each_threshold_rises_above_the_one_before_and_not_only_above_the_first():
    assert strictly_rising([]) == ()
    assert strictly_rising([-3.0]) == (-3.0,)
    assert strictly_rising([1.0, 2.0, 1.5]) == (1.0, 2.0, 2.0 + 2.0**-22)
    assert strictly_rising([5.0, 1.0]) == (5.0, 5.0 + 2.0**-21)
    assert strictly_rising([0.0, -0.0])[1] == 2.0**-149
    assert strictly_rising([1e39])[0] == math.inf  # beyond fp32; `Levels` refuses it
    assert strictly_rising([-1e39])[0] == -math.inf


@pytest.mark.parametrize("zero_point", [256.0, -256.0, 255.5])
def test_a_zero_point_of_as_many_levels_as_there_can_be_is_a_shift(zero_point):
    grid = Grid(2, zero_point)
    assert grid.offset == 1 + zero_point
    assert grid.decode(torch.tensor([0, 1])).tolist() == [-1 - zero_point, -zero_point]
    assert not grid.fits_int8


@pytest.mark.parametrize("zero_point", [256.5, -256.5, 257.0, 0.3])
def test_a_zero_point_beyond_that_or_between_halves_is_none(zero_point):
    with pytest.raises(BellboxError, match="must be a multiple of 1/2"):
        Grid(2, zero_point)


@pytest.mark.parametrize(
    ("n", "zero_point", "fits"),
    [
        (128, -0.5, True),  # 2q from -127 to 127
        (129, 0.0, False),  # 2q from -129 to 127
        (129, -0.5, True),  # whole, -64 to 64
        (2, -128.0, False),  # 127 and 128
        (2, -127.0, True),  # 126 and 127
        (2, 127.0, True),  # -128 and -127
        (2, 128.0, False),  # -129 and -128
        (256, 0.0, True),
        (256, -1.0, False),
        (2, -63.5, True),  # halves: 2q of 125 and 127
        (2, -64.5, False),
    ],
)
def test_int8_holds_minus_128_to_127_and_no_more(n, zero_point, fits):
    grid = Grid(n, zero_point)
    assert grid.fits_int8 == (min(grid.integers) >= -128 and max(grid.integers) <= 127) == fits
