"""Moments that scales are set from: a few numbers of a tensor, or of all parts of one that several processes hold."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor


class Moments:
    """Of a first tensor; fp64 scalars, each computed where it is asked for.

    Args:
        x: fp64, any shape with entries.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude."""
        return self._x.abs().mean()

    @property
    def rms(self) -> Tensor:
        """Root of the mean square."""
        return self._x.square().mean().sqrt()

    @property
    def positive_rms(self) -> Tensor:
        """`rms` of what a ReLU leaves."""
        return self._x.clamp(min=0).square().mean().sqrt()

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude."""
        return self._x.abs().amax()


class SummedMoments(Moments):
    """Of several tensors, from their sums.

    Args:
        sums: fp64 `[5]`: the number of entries, the sums of their magnitudes, of their squares and of the squares of
            those above zero, and the largest magnitude.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Of one fp64 tensor, which may be empty."""
        x = x.reshape(-1)
        size = x.abs()
        largest = size.amax() if len(x) else x.new_zeros(())
        numbers = (
            x.new_tensor(float(len(x))),
            size.sum(),
            x.square().sum(),
            x.clamp(min=0).square().sum(),
            largest,
        )
        return cls(torch.stack(numbers))

    def joined(self, other: SummedMoments) -> SummedMoments:
        """Of both together."""
        largest = torch.maximum(self.sums[4], other.sums[4])
        return SummedMoments(torch.cat((self.sums[:4] + other.sums[:4], largest.reshape(1))))

    def _mean(self, place: int) -> Tensor:
        return self.sums[place] / self.sums[0]

    @property
    def mean_abs(self) -> Tensor:
        """Mean of the magnitudes, of all tensors together."""
        return self._mean(1)

    @property
    def rms(self) -> Tensor:
        """Root of the mean square, of all tensors together."""
        return self._mean(2).sqrt()

    @property
    def positive_rms(self) -> Tensor:
        """`rms` of what a ReLU leaves of all tensors."""
        return self._mean(3).sqrt()

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude in any of the tensors."""
        return self.sums[4]
