from __future__ import annotations

import math

import pytest

from bellbox.errors import BellboxError
from bellbox.runs.planner import quantized_fraction, tokens_per_byte


def test_the_law_at_a_known_point() -> None:
    # 3e9 tokens for 95e6 parameters of 2 bits: S = 126.3 tokens a byte, ln S = 4.839.
    assert tokens_per_byte(3_000_000_000, 95_000_000, 2) == pytest.approx(126.3158, rel=1e-6)
    assert quantized_fraction(3_000_000_000, 95_000_000, 2) == pytest.approx(0.24888, abs=1e-4)


def test_the_fraction_grows_with_the_budget_and_falls_with_size_and_bits() -> None:
    fractions = [quantized_fraction(tokens, 10**8, 4) for tokens in (10**9, 10**10, 10**11, 10**12)]
    assert fractions == sorted(fractions)
    assert 0 < fractions[0] < fractions[-1] < 1
    assert quantized_fraction(10**10, 10**8, 2) > quantized_fraction(10**10, 10**8, 4)
    assert quantized_fraction(10**10, 10**8, 4) > quantized_fraction(10**10, 10**9, 4)


def test_ternary_lies_between_one_and_two_bits() -> None:
    one, ternary, two = (quantized_fraction(10**10, 10**8, bits) for bits in (1, math.log2(3), 2))
    assert one > ternary > two


def test_a_budget_outside_the_law_is_refused() -> None:
    with pytest.raises(BellboxError, match="the law of the best quantized fraction begins above 1"):
        quantized_fraction(1000, 10**6, 4)
