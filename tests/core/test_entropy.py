from __future__ import annotations

import math

import pytest
import torch

from bellbox.core.entropy import code_counts, entropy_bits, saturated_fraction
from bellbox.core.grid import Levels


def test_counts():
    codes = torch.tensor([[0, 3, 3], [1, 3, 0]], dtype=torch.uint8)
    assert code_counts(codes, 4).tolist() == [2, 1, 0, 3]
    assert code_counts(codes[:0], 4).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([5, 5], 1),
        ([7, 7, 7, 7], 2),
        ([9, 0], 0),
        ([0, 0], 0),
        ([1, 1, 2], 1.5),
        ([1, 1, 1], math.log2(3)),
        ([5, 0, 5], 1),
        ([0.5, 0.5], 1),
    ],
)
def test_entropy(counts, bits):
    assert entropy_bits(torch.tensor(counts)) == pytest.approx(bits, abs=1e-12)


def test_entropy_of_huge_counts_keeps_its_digits():
    assert entropy_bits(torch.tensor([2**40, 2**40])) == 1.0


@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
def test_gaussian_values_use_every_level_equally_often(n):
    v = torch.randn(1_000_000, generator=torch.Generator().manual_seed(n))
    counts = code_counts(Levels.gaussian(n).encode(v), n)
    assert entropy_bits(counts) == pytest.approx(math.log2(n), abs=1e-4)
    assert saturated_fraction(counts) == pytest.approx(2 / n if n > 2 else 1, abs=2e-3)


def test_entropy_of_one_code_is_not_minus_zero():
    assert math.copysign(1, entropy_bits(torch.tensor([3]))) == 1


def test_saturated_codes_are_the_first_and_the_last():
    assert saturated_fraction(torch.tensor([1, 5, 6, 8])) == 9 / 20


def test_saturated_fraction_of_nothing_is_nan():
    assert math.isnan(saturated_fraction(torch.zeros(4)))
