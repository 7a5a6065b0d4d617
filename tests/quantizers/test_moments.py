"""Moments of a tensor against their definitions, of one and of several parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bellbox.quantizers.moments import Moments, SummedMoments

X = torch.tensor([[0.5, -3.0, 2.0], [-0.25, 4.0, -7.0]], dtype=torch.float64)
WANTED = {
    "mean_abs": sum((0.5, 3, 2, 0.25, 4, 7)) / 6,
    "rms": (sum((0.25, 9, 4, 0.0625, 16, 49)) / 6) ** 0.5,
    "positive_rms": (sum((0.25, 4, 16)) / 6) ** 0.5,
    "absmax": 7.0,
}
WAYS: dict[str, Callable[[], Moments]] = {
    "whole": lambda: Moments(X),
    "summed": lambda: SummedMoments.of(X),
    "joined": lambda: SummedMoments.of(X[1]).joined(SummedMoments.of(X[0])),
    "the other way": lambda: SummedMoments.of(X[0]).joined(SummedMoments.of(X[1])),
    "nothing first": lambda: SummedMoments.of(X[:0]).joined(SummedMoments.of(X)),
    "nothing last": lambda: SummedMoments.of(X).joined(SummedMoments.of(X[:0])),
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("way", WAYS)
def test_each_is_what_its_name_says(way: str, name: str) -> None:
    value = getattr(WAYS[way](), name)
    assert isinstance(value, Tensor)
    assert float(value) == pytest.approx(WANTED[name], rel=1e-14)


def test_the_sums_of_nothing_are_zeros() -> None:
    assert SummedMoments.of(X[:0]).sums.tolist() == [0] * 5
